"""The verification of CUDA kernels, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from megatron_ledom.ops.gpu import Gpu
from megatron_ledom.ops.mask import dense_mask
from megatron_ledom.ops.verification import Build, find_fault
from megatron_ledom.ops.verify import checks, speed, wrappers
from megatron_ledom.ops.verify.child import Notebook, tallied
from megatron_ledom.ops.verify.clock import Clock
from megatron_ledom.ops.verify.run import Options, Report, keep, run_child, table
from megatron_ledom.ops.verify.sanitizer import Job, jobs, run_job

CPU = torch.device("cpu")
BUILD, GPU = Build("3f" * 32, "nvcc 13.0.88"), Gpu("NVIDIA H100 80GB HBM3", 90, "580.159.04")


def test_a_section_that_breaks_is_a_fault_and_the_next_one_runs(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path / "found.json", "sm80", Clock(60))

    def breaks() -> tuple[list[str], None]:
        assert json.loads(notebook.path.read_text())["current"] == "first"  # what a hang would leave
        raise RuntimeError("CUDA error 700")

    notebook.run("first", breaks)
    notebook.run("second", lambda: ([], {"cases": 3}))
    notebook.clock = Clock(0)
    notebook.run("third", lambda: ([], None))
    found = json.loads(notebook.path.read_text())
    assert found["faults"] == ["first broke off: RuntimeError: CUDA error 700", "third: not run, no time was left"]
    assert [section["faults"] for section in found["sections"].values()] == [1, 0] and found["current"] is None


def test_correctness_counts_cases_and_says_where_time_ran_out() -> None:
    tally = checks.Tally()
    tally.add("a", 0.4, [])
    tally.add("b", float("nan"), ["o is off"])
    tally.add("c", 0.2, [])
    faults, facts = tallied(tally)
    assert faults == ["b: o is off"] and (facts["cases"], facts["worst_case"]) == (3, "b")
    cut = checks.check_correctness(["portable"], CPU, Clock(0), True)["portable"]
    assert cut.faults == [f"only 0 of {len(list(checks.cases(True)))} cases were run: no time was left"]
    every = list(checks.cases(False))
    assert {case[5] for case in every} == {64, 128, 192} and {case[3:5] for case in every} >= {(4, 4), (4, 2), (3, 1)}
    assert len({case[0] for case in every}) == 9 and all(seq % 2 for _, _, seq, *_ in every)


def test_a_wrong_kernel_is_caught_by_every_check_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right kernels pass; a path that does not exist fails case by case, and the check goes on."""
    monkeypatch.setattr(checks, "HEAD_DIMS", (64,))
    monkeypatch.setattr(
        checks, "cases", lambda is_quick: [("reversed", 1, 97, 2, 1, 64), ("both sides", 1, 33, 2, 1, 64)]
    )
    found = checks.check_correctness(["portable", "sm70"], CPU, Clock(100), True)
    assert not found["portable"].faults and found["portable"].num_cases == 2
    assert len(found["sm70"].faults) == 2 and "no such path" in found["sm70"].faults[0]
    assert checks.check_torch_face("portable", CPU) == []


def test_a_part_whose_process_dies_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = Report({"sm80": []})
    assert run_child(report, ["sm80"], tmp_path, 60, Options()) == ["start: its process ended with status 1"]


def test_the_record_says_what_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDOM_VERIFICATION", str(tmp_path / "records"))
    report = Report({"sm80": [], "rope": ["off by 1"] * 20}, {"sm80": {"correctness": {"seconds": 1.0, "faults": 0}}})
    report.sections["sm80"]["correctness"]["facts"] = {"cases": 3, "worst_share_of_allowed": 0.5, "worst_case": "a"}
    passed = {"sm80": True, "rope": False}
    lines = table(report, passed)
    assert lines[0] == "sm80     passed   3 cases, the worst error 0.50 of what is allowed (a)"
    assert lines[1].startswith("rope     FAILED") and "         ... and 14 more" in lines
    out = tmp_path / "all.json"
    keep(report, passed, Options(is_quick=True, json_path=out), BUILD, GPU)
    assert json.loads(out.read_text())["parts"]["rope"]["num_faults"] == 20 and not (tmp_path / "records").exists()
    keep(report, passed, Options(), BUILD, GPU)
    assert find_fault(tmp_path / "records", BUILD, GPU, "sm80") is None
    assert "failed: off by 1" in str(find_fault(tmp_path / "records", BUILD, GPU, "rope"))


def test_the_sanitizer_must_find_what_was_planted(tmp_path: Path) -> None:
    every = jobs(["sm90a", "sm80"], False)
    assert every[0].planted and {job.tool for job in every} == {"memcheck", "racecheck", "synccheck", "initcheck"}
    program = tmp_path / "sanitizer"

    def says(text: str, status: int) -> str:
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        program.chmod(0o755)
        return str(program)

    planted, honest = every[0], Job("memcheck", "sm80", 64)
    assert run_job(says("Invalid __global__ read of size 16", 66), planted, 60) is None
    assert "was not reported" in str(run_job(says("0 errors", 0), planted, 60))
    assert run_job(says("0 errors", 0), honest, 60) is None
    assert "exit 66: race" in str(run_job(says("race", 66), honest, 60))
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert "more than 0 s" in str(run_job(str(program), honest, 0.1))


def test_wrappers_are_compared_word_by_word(tmp_path: Path) -> None:
    library = wrappers.build_emulated(tmp_path)
    words = wrappers.inputs(3)
    found = wrappers.run_emulated(library, words)
    assert wrappers.differences(found, found.clone()) == []
    section = dict(zip(wrappers.SECTIONS, range(len(wrappers.SECTIONS)), strict=True))
    # Two statements of ours agree with torch's: rounding to bf16, and copies with zeros for every fifth lane.
    pairs = words[2:, 6:14].contiguous().view(torch.float32).bfloat16().view(torch.int32)
    is_number = ~words[2:, 6:14].contiguous().view(torch.float32).isnan().view(30, 4, 2).any(2)
    assert torch.equal(found[section["cvt.rn.bf16x2"], 2:][is_number], pairs[is_number])
    copied = words[:, :4].clone()
    copied[4::5] = 0
    assert torch.equal(found[0], copied[(7 * torch.arange(32) + 3) % 32])
    wrong = found.clone()
    wrong[section["ldmatrix"], 5, 1] ^= 1
    wrong[section["mma.m16n8k16"]] = (found[section["mma.m16n8k16"]].view(torch.float32) + 1e-3).view(torch.int32)
    faults = wrappers.differences(wrong, found)
    assert len(faults) == 2 and faults[0].startswith("ldmatrix: 1 of 128 words differ; lane 5 has ")
    assert faults[1].startswith("mma.m16n8k16: off by ")


def test_rates_count_what_a_mask_allows() -> None:
    mask = speed.document_mask(2, 700, CPU)
    assert speed.num_scores(mask, 2, 700, CPU) == int(dense_mask(mask, 2, 700).sum())
    rates = {
        "shape": [1, 2, 2, 8, 64],
        "mask": "reversed",
        "tflops": {"sm80": [1.0, 2.5]},
        "unavailable": {"cudnn": "no"},
    }
    assert speed.speed_table([rates])[1].split() == [
        "1,",
        "2,",
        "2,",
        "8,",
        "64",
        "reversed",
        "1.0",
        "/",
        "2.5",
        "no",
        "kernel",
    ]


def test_a_clock_ends() -> None:
    clock = Clock(0.01)
    time.sleep(0.02)
    assert clock.is_over and not Clock(60).is_over
