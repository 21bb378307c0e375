"""tools/plan.py and tools/check_layout.py as a user runs them: a plan with its picture, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ledom.testing import run_tool


def test_a_plan_of_a_small_model(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = run_tool(
        "plan.py",
        *("--preset", "tiny", "--nodes", 1, "--gpus-per-node", 2, "--gpu", "h200", "--show", 2),
        *("--vocab-size", 1024, "--tokens", 1e9, "--output", picture),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny: 1.05 M parameters, 256 tokens x 16 samples a step, bf16, 2 x h200"), lines[0]
    header = lines[2].split()
    assert header[:6] == ["TP", "PP", "DP", "mb", "recompute", "weights"] and header[-1] == "days"
    rows = [line.split() for line in lines[3:5]]
    speeds = [float(row[-2].replace(",", "")) for row in rows]
    assert speeds == sorted(speeds, reverse=True) and min(speeds) > 0
    assert "as the flags have it (fits):" in done.stdout
    assert "not calibrated on it" in done.stdout and "held out" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_calibration_is_printed() -> None:
    done = run_tool("plan.py", "--calibration")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out") >= 9 and "Megatron-LM 16B" in done.stdout


@pytest.mark.parametrize(
    ("tool", "flags", "words"),
    [
        ("plan.py", ("--preset", "7b", "--nodes", 0), "--nodes 0"),
        ("plan.py", ("--preset", "7b", "--output", "nowhere/x.png"), "there is no folder nowhere"),
        ("check_layout.py", ("--preset", "7b", "--max-ranks", 0), "at least 1"),
    ],
)
def test_refusals(tool: str, flags: tuple[object, ...], words: str) -> None:
    done = run_tool(tool, *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
