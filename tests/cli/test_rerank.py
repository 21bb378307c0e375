"""tools/rerank.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from random_models import save_random_model

from megatron_ledom.testing import run_tool


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_random_model(root / name, tokenizer_folder, name) for name in ("reverse", "forward")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {"question": "What is evaluated first?", "candidates": ["The left operand.", "Nothing is."], "id": 1},
        {"prompt": "What raises NameError?", "candidates": [{"text": "An unbound name."}, "A statement.", "An int."]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_ranks_a_file(models: dict[str, Path], source: Path, tmp_path: Path) -> None:
    flags = ["--lambda", 0.25, "--normalize", "token", "--separator", " ", "--device", "cpu"]
    both = ["--reverse-model", models["reverse"], "--forward-model", models["forward"]]
    result = run_tool("rerank.py", "--input", source, "--output", tmp_path / "out.jsonl", *both, *flags)
    assert result.returncode == 0, result.stderr
    assert "2 questions, 5 candidates ranked" in result.stdout
    assert "score: 10 texts in" in result.stderr
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (first["id"], second["prompt"]) == (1, "What raises NameError?")
    for line in (first, second):
        assert line["reverse_reward"] == {
            "lambda": 0.25,
            "normalize": "token",
            "separator": " ",
            "reverse_model": str(models["reverse"]),
            "forward_model": str(models["forward"]),
        }
        for candidate in line["candidates"]:
            forward = candidate["forward_logprob"] / candidate["num_forward_tokens"]
            reverse = candidate["reverse_logprob"] / candidate["num_reverse_tokens"]
            assert candidate["reward"] == pytest.approx(0.75 * forward + 0.25 * reverse)
        assert [c["rank"] for c in line["candidates"]] == list(range(1, len(line["candidates"]) + 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reverse-model", "{forward}"], "is a forward model"),
        (["--reverse-model", "{reverse}", "--forward-model", "{reverse}"], "is a reverse model"),
        (["--reverse-model", "{reverse}"], "line 1, candidate 1: no forward_logprob, and no --forward-model"),
        (["--reverse-model", "{reverse}", "--lambda", "1.5"], "--lambda is 1.5"),
        (["--reverse-model", "{reverse}", "--input", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--reverse-model", "{reverse}", "--output", "absent/out.jsonl"], "there is no folder absent"),
        (["--reverse-model", "{reverse}", "--normalize", "word"], "invalid choice: 'word'"),
    ],
)
def test_bad_input_is_refused(
    models: dict[str, Path], source: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    filled = [flag.format(**models) for flag in flags]
    result = run_tool("rerank.py", "--input", source, "--output", tmp_path / "out.jsonl", *filled)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_bad_line_is_named(models: dict[str, Path], source: Path, tmp_path: Path) -> None:
    with source.open("a") as file:
        file.write('{"question": "Why?", "candidates": ["Because.", ""]}\n')
    arguments = ["--input", source, "--output", tmp_path / "out.jsonl", "--reverse-model", models["reverse"]]
    result = run_tool("rerank.py", *arguments, "--lambda", 1)
    assert result.returncode == 2
    assert f"{source}, line 3, candidate 2: field 'text' is empty" in result.stderr


def test_help_shows_the_formula() -> None:
    result = run_tool("rerank.py", "--help")
    assert result.returncode == 0
    assert "R(x, y) = (1 - lambda) * log P_F(y given x) + lambda * log P_R(x given y)" in result.stdout
