"""The experiment with Reverse Reward at a size that takes a minute or two: every step, with twins that know little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.testing import REPOSITORY, tool_environment

SCRIPT = REPOSITORY / "examples/reverse_reward/experiment.py"
SMALL = [
    *("--seeds", "1", "--num-training", "300", "--num-tuning", "40", "--num-problems", "60", "--num-samples", "3"),
    *("--vocab-size", "400", "--num-layers", "2", "--hidden-size", "64", "--batch", "4"),
    *("--train-iters", "6", "--tune-iters", "2", "--answer-tokens", "24", "--held-out-share", "0.4"),
]


def experiment(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=tool_environment(), timeout=580)


@pytest.mark.distributed
def test_every_step_runs_and_none_runs_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = experiment("--output", folder, *SMALL)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "| combined " in result.stdout
    assert "left in all]" in result.stdout
    for name, direction in (("forward", "forward"), ("reverse", "reverse"), ("scorer", "reverse")):
        config = json.loads((folder / "seed-1/hf" / name / "config.json").read_text())
        assert config["ledom"]["direction"] == direction
    lines = [json.loads(line) for line in (folder / "seed-1/ranked.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    trained = {json.loads(line)["question"] for line in (folder / "data/training.jsonl").read_text().splitlines()}
    assert not trained & {line["question"] for line in lines}
    untuned = [json.loads(line) for line in (folder / "seed-1/ranked-untuned.jsonl").read_text().splitlines()]
    for line, other in zip(lines, untuned, strict=True):
        by_index = {c["index"]: c for c in other["candidates"]}
        for candidate in line["candidates"]:
            assert by_index[candidate["index"]]["text"] == candidate["text"]
            assert by_index[candidate["index"]]["forward_logprob"] == candidate["forward_logprob"]
            assert by_index[candidate["index"]]["reverse_logprob"] != candidate["reverse_logprob"]
    report = json.loads((folder / "ranked-1.json").read_text())
    assert report["sizes"] == [1, 2, 3]
    assert "greedy" in report["strategies"]
    assert report["runs"][0]["num_problems"] + report["runs"][0]["num_held_out"] == 60

    num_steps = len(list((folder / "steps").glob("*.json")))
    again = experiment("--output", folder, *SMALL)
    assert again.returncode == 0, again.stdout[-2000:]
    assert again.stdout.count("already done") == num_steps == 8
    other = experiment("--output", folder, *SMALL, "--temperature", "0.5")
    assert other.returncode == 2
    assert "has other settings (temperature)" in other.stderr


def test_the_path_runs_with_models_of_ones_own(tokenizer_folder: Path, tmp_path: Path) -> None:
    models = {name: save_random_model(tmp_path / name, tokenizer_folder, name) for name in ("forward", "reverse")}
    command = [sys.executable, str(SCRIPT.with_name("any_model.py")), "--output", str(tmp_path / "out")]
    command += ["--forward-model", str(models["forward"]), "--reverse-model", str(models["reverse"])]
    command += ["--generators", "chain_sum", "basic_arithmetic", "--num-samples", "2", "--max-new-tokens", "6"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=tool_environment(), timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "out/ranked.jsonl").read_text().splitlines()]
    assert [line["generator"] for line in lines] == ["chain_sum"] * 30 + ["basic_arithmetic"] * 30
    assert "| oracle of N " in (tmp_path / "out/report.md").read_text()
