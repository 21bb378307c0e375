"""tools/evaluate_rerank.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranked_files import write_ranked

from megatron_ledom.testing import run_tool


def test_two_runs_are_evaluated_printed_and_written(tmp_path: Path) -> None:
    paths = [write_ranked(tmp_path / f"{n}.jsonl", 120, 4, seed=n, reverse_skill=2.0) for n in (1, 2)]
    result = run_tool(
        "evaluate_rerank.py", "--input", *paths, "--output", tmp_path / "report", "--sets", 4, "--resamples", 500
    )
    assert result.returncode == 0, result.stderr
    markdown = (tmp_path / "report.md").read_text()
    assert result.stdout.startswith(markdown)
    assert "| reverse only " in markdown
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["file"] for run in report["runs"]] == [str(path) for path in paths]
    assert report["num_sets"] == 4
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "check 2.jsonl: 120 questions in" in result.stderr
    again = run_tool("evaluate_rerank.py", "--input", *paths, "--output", tmp_path / "report")
    assert again.returncode == 2
    assert "report.md exists" in again.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--input", "{path}", "--answer-field", "gold"], "line 1: no field 'gold' with the gold answer"),
        (["--input", "{path}", "--answer-pattern", "("], "--answer-pattern (: not a regular expression"),
        (["--input", "{path}", "--held-out-share", "0"], "--held-out-share is 0.0"),
        (["--input", "{path}", "--output", "{path}/x"], "there is no folder"),
    ],
)
def test_refusals(tmp_path: Path, flags: list[str], message: str) -> None:
    path = write_ranked(tmp_path / "ranked.jsonl", 60, 3, seed=1, reverse_skill=1.0)
    result = run_tool("evaluate_rerank.py", *(flag.format(path=path) for flag in flags))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
