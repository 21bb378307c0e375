"""tools/report.py: a page of a run of four ranks, and what it refuses."""

from __future__ import annotations

from pathlib import Path

from megatron_ledom.testing import run_tool
from megatron_ledom.train.events import read_events
from megatron_ledom.train.metrics import TRAIN_LOSS, read_metrics, read_scalars


def test_a_run_over_tensor_and_pipeline_ranks_becomes_a_page(run: Path, tmp_path: Path) -> None:
    lines, losses = read_metrics(run), read_scalars(run, TRAIN_LOSS)
    logged = {line["step"]: line["loss"] for line in lines}
    assert logged and all(abs(loss - losses[step]) < 1e-5 for step, loss in logged.items())
    kinds = [e.kind for e in read_events(run)]
    assert kinds[:2] == ["launch", "begin"] and kinds[-1] == "end", "one rank writes, once"
    assert kinds.count("launch") == 1

    page = tmp_path / "page.html"
    done = run_tool("report.py", run, "--output", page, "--no-twin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{page}: 1 run, ")
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "TP 2 x PP 2 x DP 1" in text and "<svg" in text

    again = run_tool("report.py", run, "--output", page, "--keep")
    assert again.returncode == 2
    assert f"error: {page} exists" in again.stderr


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = run_tool("report.py", tmp_path)
    assert done.returncode == 2
    assert "is not a run directory: it has no run.json" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "report.html").exists()
