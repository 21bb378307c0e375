"""Which CUDA kernels may be used: records, the check at first use, the choice among variants.

No GPU is needed: what is decided here is decided from facts, and these are the arguments. Ranks that agree are in
tests/kernels/test_agreement.py.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from megatron_ledom.errors import OutputError, UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.ops.conformance import KINDS, Problem, Results, judge_all
from megatron_ledom.ops.gpu import Gpu
from megatron_ledom.ops.kernels import Variant, cpu_paths
from megatron_ledom.ops.launch import run_poisoned
from megatron_ledom.ops.path import choose_among
from megatron_ledom.ops.trust import Trust, Use, attention_uses, check_problems, parse_permitted, self_check
from megatron_ledom.ops.verification import ROPE, Build, find_fault, record_folder, record_path, write_record

BUILD = Build("3f" * 32, "nvcc 13.0.88")
H100 = Gpu("NVIDIA H100 80GB HBM3", 90, "580.159.04")
CPU = torch.device("cpu")
VARIANTS = (Variant("sm90a", 90, 90), Variant("sm80", 80, 129))
BF16 = torch.bfloat16
PASSED = {"sm80": {"passed": True}, "sm90a": {"passed": False, "faults": ["d_q is off by 0.3"]}, ROPE: {"passed": True}}


def uses(kind: str = "reversed") -> list[Use]:
    return [Use(variant.name, BF16, 64, kind) for variant in VARIANTS]


def trust(unverified: dict[str, str] | None = None, wrong: dict[str, str] | None = None, permitted: str = "") -> Trust:
    return Trust(
        lambda part: None,
        lambda part: (unverified or {}).get(part),
        lambda use: (wrong or {}).get(use.part),
        parse_permitted(permitted),
    )


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(get_logger("megatron_ledom.ops.trust"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_a_record_verifies_what_passed_for_its_build_gpu_and_driver_only(tmp_path: Path) -> None:
    assert "run tools/verify_kernels.py on this GPU" in str(find_fault(tmp_path, BUILD, H100, "sm80"))
    path = write_record(tmp_path / "new", BUILD, H100, PASSED, torch="2.14")
    folder = path.parent
    assert path == record_path(folder, BUILD, H100) and len(list(folder.iterdir())) == 1
    assert find_fault(folder, BUILD, H100, "sm80") is None and find_fault(folder, BUILD, H100, ROPE) is None
    assert "failed: d_q is off by 0.3" in str(find_fault(folder, BUILD, H100, "sm90a"))
    assert "failed" in str(find_fault(folder, BUILD, H100, "sm200"))
    for build, gpu in (
        (Build("4f" * 32, BUILD.compiler), H100),
        (BUILD, Gpu("NVIDIA A100", 80, H100.driver)),
        (BUILD, Gpu(H100.name, 90, "590.1")),
    ):
        assert "not verified on" in str(find_fault(folder, build, gpu, "sm80"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"source": "00"}, "another source"),
        ({"compiler": "nvcc 12"}, "another compiler"),
        ({"format": 2}, "another format"),
        ({"capability": 100, "driver": "1"}, "another capability, driver"),
        ({"parts": []}, "failed"),
        ({"parts": {"sm80": {"passed": 1}}}, "failed"),
        ({"parts": {"sm80": True}}, "failed"),
    ],
)
def test_a_record_that_says_something_else_verifies_nothing(
    tmp_path: Path, change: dict[str, object], word: str
) -> None:
    path = write_record(tmp_path, BUILD, H100, PASSED)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert word in str(find_fault(tmp_path, BUILD, H100, "sm80"))


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '"sm80"'])
def test_a_record_that_cannot_be_read_verifies_nothing(tmp_path: Path, content: str) -> None:
    write_record(tmp_path, BUILD, H100, PASSED).write_text(content)
    fault = str(find_fault(tmp_path, BUILD, H100, "sm80"))
    assert "cannot be read" in fault or "another format, source" in fault


def test_records_lie_where_the_environment_says(tmp_path: Path) -> None:
    assert record_folder({"LEDOM_VERIFICATION": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert record_folder({"XDG_CACHE_HOME": "/b", "HOME": "/c"}) == Path("/b/megatron_ledom/verification")
    assert record_folder({"HOME": "/c"}) == Path("/c/.cache/megatron_ledom/verification")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set LEDOM_VERIFICATION to a folder"):
        write_record(tmp_path / "file", BUILD, H100, PASSED)


def test_auto_takes_the_first_verified_variant_that_is_right() -> None:
    assert choose_among(VARIANTS, uses(), 90, trust()).name == "sm90a"
    path = choose_among(VARIANTS, uses(), 80, trust())
    assert path.name == "sm80" and "sm90a is for capability 9.0, and this GPU has 8.0" in path.reason
    assert choose_among(VARIANTS, uses(), 90, trust({"sm90a": "not verified"})).name == "sm80"
    none = choose_among(VARIANTS, uses(), 90, trust({"sm90a": "not verified", "sm80": "not verified either"}))
    assert none.name == "torch" and none.reason == "sm90a: not verified; sm80: not verified either"
    assert choose_among(VARIANTS, uses(), 75, trust()).name == "torch"


def test_a_failed_first_use_falls_back_with_one_line(lines: pytest.LogCaptureFixture) -> None:
    known = trust(wrong={"sm90a": "o is off"})
    for _ in range(3):
        assert choose_among(VARIANTS, uses(), 90, known).name == "sm80"
    assert lines.messages == [
        "kernels sm90a (bfloat16, head size 64, mask reversed): NOT USED, the check at first use failed: o is off"
    ]
    both = trust(wrong={"sm90a": "o is off", "sm80": "d_k is off"})
    assert choose_among(VARIANTS, uses(), 90, both).name == "torch"


def test_an_unverified_variant_is_used_on_explicit_wish_only(lines: pytest.LogCaptureFixture) -> None:
    unverified = {"sm90a": "not verified here", "sm80": "not verified here"}
    assert choose_among(VARIANTS, uses(), 90, trust(unverified)).name == "torch"
    assert lines.messages == []
    assert choose_among(VARIANTS, uses(), 90, trust(unverified), "sm80").name == "sm80"
    assert choose_among(VARIANTS, uses(), 90, trust(unverified, permitted="sm80,rope")).name == "sm80"
    assert lines.messages == [
        "kernels sm80: used because path 'sm80' was asked for, although not verified here",
        "kernels sm80: used as LEDOM_UNVERIFIED allows it, although not verified here",
    ]
    # The wish is no excuse for wrong numbers, and takes no other kernel instead.
    with pytest.raises(UsageError, match="path 'sm80' cannot serve this call: sm80: o is off"):
        choose_among(VARIANTS, uses(), 90, trust(unverified, {"sm80": "o is off"}), "sm80")
    with pytest.raises(UsageError, match=r"capability 9\.0, and this GPU has 8\.0"):
        choose_among(VARIANTS, uses(), 80, trust(), "sm90a")


def test_a_kernel_that_cannot_be_started_is_a_fault() -> None:
    def raises(use: Use) -> str | None:
        raise RuntimeError("CUDA error 700: an illegal memory access was encountered")

    known = Trust(lambda part: None, lambda part: None, raises)
    assert "illegal memory access" in choose_among(VARIANTS, uses(), 90, known).reason


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_at_first_use_accepts_right_kernels_and_no_others(kind: str) -> None:
    use = Use(cpu_paths()[0], BF16, 64, kind)
    assert self_check(use, CPU) is None
    assert "no such path" in choose_among([VARIANTS[1]], [Use("sm70", BF16, 64, kind)], 90, real_trust()).reason

    def halved(problem: Problem) -> Results:
        o, lse, d_q, d_k, d_v = run_poisoned(problem, use.part)
        return o, lse, d_q, d_k / 2, d_v

    def unwritten(problem: Problem) -> Results:
        o, lse, d_q, d_k, d_v = run_poisoned(problem, use.part)
        d_v[:, -1] = torch.nan
        return o, lse, d_q, d_k, d_v

    def shifted(problem: Problem) -> Results:
        o, lse, d_q, d_k, d_v = run_poisoned(problem, use.part)
        return o, lse + 1e-3, d_q, d_k, d_v

    for run, word in ((halved, "d_k is off"), (unwritten, "rows are NaN"), (shifted, "logarithms are off")):
        assert word in "; ".join(judge_all(check_problems(use, CPU), run).faults)


def real_trust() -> Trust:
    return Trust(lambda part: None, lambda part: None, lambda use: self_check(use, CPU))


def test_the_check_changes_nothing_around_it() -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        assert self_check(Use(cpu_paths()[0], BF16, 64, "causal"), CPU) is None
    assert self_check(Use(ROPE, torch.float32), CPU) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_asks_for_the_same_uses_in_the_same_order_on_every_rank() -> None:
    found = attention_uses(("sm90a", "sm80"), BF16, 128)
    assert len(found) == len(set(found)) == 2 * len(KINDS) + 1 and found[-1] == Use(ROPE, BF16)


def test_without_torch_distributed_agreement_is_with_itself() -> None:
    known = trust({"sm90a": "not verified"}, {"sm80": "o is off"})
    known.agree(uses())
    assert choose_among(VARIANTS, uses(), 90, known).name == "torch"
