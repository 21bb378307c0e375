"""tools/score.py as a user runs it; the library behind it is tested in tests/unit/test_score_file.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from random_models import random_pairs, save_random_model

from megatron_ledom.inference import ReverseLM
from megatron_ledom.testing import REPOSITORY, english_documents, run_tool, tool_environment


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("reverse"), tokenizer_folder, "reverse")


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": a, "answer": b}) + "\n" for a, b in pairs))
    return path


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(model: Path, tmp_path: Path) -> None:
    pairs = random_pairs(english_documents(), 820, longest_chars=200)
    pairs = [pair for pair in pairs if all(map(str.strip, pair))][:800]
    source, output = write(tmp_path / "in.jsonl", pairs), tmp_path / "out.jsonl"
    flags = ["--model", model, "--input", source, "--output", output, "--earlier-key", "question"]
    flags += ["--later-key", "answer", "--separator", "\n", "--device", "cpu"]
    # One pair a batch and a commit: seconds of work, of which a fraction is done when the file has grown so far.
    command = [sys.executable, str(REPOSITORY / "tools" / "score.py"), *map(str, flags), "--batch-tokens", "1"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=tool_environment())
    cache = tmp_path / "out.jsonl.scores.sqlite"
    while child.poll() is None and (not cache.exists() or cache.stat().st_size < 60_000):
        time.sleep(0.01)
    assert child.poll() is None, "it ended before it could be killed"
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not output.exists()
    done = run_tool("score.py", *flags)
    assert done.returncode == 0, done.stderr
    num_known = int(done.stdout.split("; ")[1].split(" ")[0].replace(",", ""))
    assert 0 < num_known < 800
    assert "log P(earlier | later) of 800 pairs" in done.stdout
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    expected = ReverseLM.load(model, device="cpu").logprobs([(a, "\n" + b) for a, b in pairs])
    assert [line["question"] for line in lines] == [a for a, _ in pairs]
    for line, score in zip(lines, expected, strict=True):
        assert line["score"]["logprob"] == pytest.approx(score.logprob, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--earlier-key", "absent"], "in.jsonl, line 1: no field 'absent'"),
        (["--model", "absent"], "error: model folder absent: there is no such folder"),
        (["--cache", "a", "--no-cache"], "--cache and --no-cache"),
    ],
)
def test_bad_input_is_refused(model: Path, tmp_path: Path, more: list[object], message: str) -> None:
    source = write(tmp_path / "in.jsonl", [("a", "b")])
    flags = ["--model", model, "--input", source, "--output", tmp_path / "out.jsonl", "--later-key", "answer"]
    done = run_tool("score.py", *flags, *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
