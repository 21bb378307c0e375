"""The parity check itself: what it passes, what it refuses and what it says, and the memory that it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from convert_cases import CASES
from parity_cases import DAMAGES, DEEP_LAYER_BYTES, MISFITS, compare_all, damage, run_program

from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.convert.parity import check_parity
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ParityError
from megatron_ledom.testing import tool_environment

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FEW_LAYERS, MANY_LAYERS = 2, 8


@pytest.fixture(scope="session")
def gqa(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of fp32 weights with a padded vocabulary."""
    output = tmp_path_factory.mktemp("parity") / "gqa"
    export_checkpoint(cases / "gqa_padded", output, options=ExportOptions(parity=False))
    return output


@pytest.fixture(scope="session")
def bfloat16(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("parity") / "bfloat16"
    export_checkpoint(cases / "bfloat16", output, options=ExportOptions(parity=False))
    return output


@pytest.fixture(scope="session")
def reports(
    cases: Path, gqa: Path, bfloat16: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Many comparisons, each a second, in one process, of which the imports are most."""
    scratch = tmp_path_factory.mktemp("damaged")
    jobs: dict[str, dict[str, Any]] = {
        name: {"checkpoint_folder": cases / "gqa_padded", "hf_folder": damage(gqa, scratch / name, change)}
        for name, (change, _) in (DAMAGES | MISFITS).items()
    }
    like_an_import = damage(gqa, scratch / "import", lambda weights, config: config.pop("ledom"))
    for name in TOKENIZER_FILES:
        (like_an_import / name).unlink()
    jobs |= {
        "bfloat16": {"checkpoint_folder": cases / "bfloat16", "hf_folder": bfloat16},
        "float16": {"checkpoint_folder": cases / "gqa_padded", "hf_folder": gqa, "dtype": "float16"},
        "large": {"checkpoint_folder": cases / "gqa_padded", "hf_folder": gqa, "max_gradient_parameters": 1000},
        "import": {"checkpoint_folder": cases / "gqa_padded", "hf_folder": like_an_import, "direction": "forward"},
    }
    return dict(zip(jobs, compare_all(list(jobs.values()), scratch), strict=True))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_located(reports: dict[str, dict[str, Any]], name: str) -> None:
    report = reports[name]
    assert not report["passed"]
    assert re.search(DAMAGES[name][1], "; ".join(report["problems"]))


def test_an_embedding_row_that_no_probe_reads_is_compared_all_the_same(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["embedding row"]
    assert len(report["problems"]) == 1
    assert report["max_relative_difference"] < 1e-5 and report["embedding_rows"]["id"] == 777


def test_a_sound_folder_passes_in_fp32_in_its_own_dtype_and_in_every_gradient(
    reports: dict[str, dict[str, Any]],
) -> None:
    report = reports["bfloat16"]
    assert report["passed"] and report["problems"] == []
    assert report["max_relative_difference"] < 1e-5
    assert report["first_difference"] is None and report["embedding_rows"]["max_relative_difference"] == 0
    assert report["direction"] == "reverse" and report["weights"] == "bfloat16"
    assert [s["text"] for s in report["sentences"]][:1] == ["What came before this sentence?"]
    for sentence in report["sentences"]:
        assert sentence["loss_hf"] == pytest.approx(sentence["loss_megatron"], abs=1e-4)
    saved, gradients = report["saved_dtype"], report["gradients"]
    assert saved["ran"] and saved["dtype"] == "bfloat16" and saved["positions"] == 32
    assert 1e-3 < saved["relative_error_hf"] <= 2 * saved["relative_error_megatron"] + 0.002
    assert gradients["ran"] and gradients["passed"] and gradients["tensors"] == 2 * 9 + 3
    assert gradients["max_relative_difference"] < 1e-5


def test_weights_are_rounded_to_the_dtype_of_the_conversion_on_both_sides(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["float16"]
    assert report["passed"] and report["weights"] == report["saved_dtype"]["dtype"] == "float16"
    assert report["saved_dtype"]["relative_error_megatron"] < 0.01


def test_the_report_says_what_did_not_run(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["large"]
    assert report["passed"]
    assert report["gradients"] == {"ran": False, "why": "the model has more than 1,000 parameters"}
    assert report["saved_dtype"]["ran"] is False and "float32" in report["saved_dtype"]["why"]


def test_a_folder_without_record_and_tokenizer_is_compared_on_random_ids(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["import"]
    assert report["passed"] and report["sentences"] == []
    assert report["why_no_sentences"] == "the folder has no tokenizer"
    assert report["positions"] == 64 and report["direction"] == "forward"


@pytest.mark.parametrize("name", MISFITS)
def test_a_folder_of_other_tensors_is_refused_by_name(reports: dict[str, dict[str, Any]], name: str) -> None:
    assert re.search(MISFITS[name][1], reports[name]["refusal"])


def test_an_unknown_direction_is_asked_for(cases: Path, gqa: Path, tmp_path: Path) -> None:
    folder = damage(gqa, tmp_path / "hf", lambda weights, config: config.pop("ledom"))
    with pytest.raises(ParityError, match=r"hf/config\.json has no ledom entry: say the direction"):
        check_parity(cases / "gqa_padded", folder)


def test_progress_reaches_the_terminal_and_nothing_else_does(
    cases: Path, bfloat16: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = check_parity(cases / "bfloat16", bfloat16, direction=Direction.REVERSE, dtype="bfloat16")
    assert report["passed"]
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "transformers, computing in float32",
        "transformers, computing in float32, gradients",
        "transformers, computing in bfloat16",
        "Megatron, computing in float32",
        "Megatron, computing in bfloat16",
        "Megatron, computing in float32, gradients",
    ]
    assert all("MB/s" in line for line in lines)


def test_the_streamed_model_is_the_whole_one(cases: Path) -> None:
    """Layers stacked or not, tied or not, vocabulary in blocks: the same numbers to the last bit."""
    report = json.loads(run_program("streamed", *(cases / name for name in CASES)).splitlines()[-1])
    assert set(report) == set(CASES)
    for name, found in report.items():
        assert found["difference"] == 0 and found["held"] == [], name
        assert found["blocks"] == 5 and found["bytes"][0] == found["bytes"][1], name


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, tokenizer_folder: Path) -> None:
    """302 MB of layers in fp32 against 75 MB: the difference of the peaks is less than two layers."""
    peak_bytes = {}
    run_program("deep", tmp_path, tokenizer_folder, FEW_LAYERS, MANY_LAYERS)
    for num_layers in (FEW_LAYERS, MANY_LAYERS):
        save, folder = tmp_path / str(num_layers), tmp_path / f"hf{num_layers}"
        export_checkpoint(save, folder, options=ExportOptions(parity=False))
        peak_bytes[num_layers] = measure_peak(save, folder, tmp_path / f"report{num_layers}.json")
    assert peak_bytes[MANY_LAYERS] - peak_bytes[FEW_LAYERS] < 2 * DEEP_LAYER_BYTES, peak_bytes


def measure_peak(checkpoint: Path, folder: Path, report: Path) -> int:
    """The largest resident size of a comparison's process, in bytes."""
    command = [sys.executable, "-m", "megatron_ledom.convert.parity", "--load", checkpoint, "--hf", folder]
    child = subprocess.Popen(
        [*map(str, command), "--report", str(report), "--max-gradient-parameters", "0"], env=tool_environment()
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    result = json.loads(report.read_text())
    assert child.returncode == 0 and result["passed"], result["problems"]
    assert result["saved_dtype"]["ran"] and len(result["sentences"]) > 0
    return usage.ru_maxrss * 1024
