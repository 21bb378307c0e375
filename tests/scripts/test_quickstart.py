"""The whole quickstart at a size that takes a minute or two, on real text and without the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.testing import REPOSITORY, tool_environment

SCRIPT = REPOSITORY / "examples/quickstart/quickstart.py"
SMALL = [
    *("--vocab-size", "1024", "--first-iters", "3", "--train-iters", "6"),
    *("--num-texts", "1", "--num-questions", "4", "--num-candidates", "3"),
]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def quickstart(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=tool_environment(), timeout=580)


@pytest.mark.distributed
def test_every_step_runs_and_a_finished_run_is_not_done_again(corpus: Path, tmp_path: Path) -> None:
    result = quickstart("--output", tmp_path, "--corpus", corpus, *SMALL)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    run = tmp_path / "run-001"
    for direction in Direction:
        latest = run / direction / "checkpoints/latest_checkpointed_iteration.txt"
        assert latest.read_text() == "6"
        launches = json.loads((run / direction / "run.json").read_text())["launches"]
        assert [launch["world_size"] for launch in launches] == [4, 2]
        assert json.loads((run / "hf" / direction / "config.json").read_text())["ledom"]["direction"] == direction
    assert (run / "loss_curves.png").read_bytes().startswith(PNG_SIGNATURE)
    assert "To be, or not to be" in (run / "written.txt").read_text()
    ranked = [json.loads(line) for line in (run / "ranked.jsonl").read_text().splitlines()]
    assert [sum(c["is_true"] for c in question["candidates"]) for question in ranked] == [1] * 4
    assert {m["direction"] for m in json.loads((run / "losses.json").read_text())["models"]} == {"reverse", "forward"}

    summary = (run / "SUMMARY.md").read_text()
    assert summary.strip() in result.stdout
    assert summary.count("\n| ") == len(list((run / "steps").glob("*.json"))) == 14
    assert "left in all]" in result.stdout
    assert "iteration 4/6, loss " in result.stdout, "progress of the resumed run"

    again = quickstart("--output", tmp_path, "--resume")
    assert again.returncode == 0, again.stdout[-4000:]
    assert again.stdout.count("already done") == 14
    assert not (tmp_path / "run-002").exists()


def test_a_failing_step_shows_the_end_of_its_log(tmp_path: Path) -> None:

    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(200)), encoding="utf-8")
    (tmp_path / "run-001" / "data").mkdir(parents=True)
    (tmp_path / "run-001" / "settings.json").write_text(json.dumps({"corpus": str(text)}), encoding="utf-8")
    (tmp_path / "run-001" / "data" / "reverse_text_document.bin").mkdir()  # in the way of the preprocessing
    result = quickstart("--output", tmp_path, "--resume")
    assert result.returncode == 2
    assert "preprocess_data.py" in result.stderr
    assert "preprocess-reverse.log" in result.stderr
    assert "Traceback" not in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume: no run in"),
        (["--first-iters", "9", "--train-iters", "9"], "--first-iters 9 must lie between 0 and --train-iters 9"),
        (["--corpus", "absent.jsonl"], "--corpus absent.jsonl"),
    ],
)
def test_refusals(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = quickstart("--output", tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bad_line_of_the_corpus_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "not"}\n', encoding="utf-8")
    result = quickstart("--output", tmp_path / "runs", "--corpus", path)
    assert result.returncode == 2
    assert f"{path}:2:" in result.stderr
