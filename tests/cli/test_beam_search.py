"""tools/beam_search.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.testing import run_tool


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_random_model(root / name, tokenizer_folder, name) for name in ("reverse", "forward")}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "What is evaluated first?", "answer": "18"}) + "\n")
    return path


@pytest.mark.parametrize("step", [["--step", "sentence"], ["--step", "pattern", "--step-pattern", "[aeiou]"]])
def test_a_search_is_written_and_printed(
    models: dict[str, Path], questions: Path, tmp_path: Path, step: list[str]
) -> None:
    result = run_tool(
        "beam_search.py",
        *("--input", questions, "--output", tmp_path / "out.jsonl", "--device", "cpu", "--print"),
        *("--forward-model", models["forward"], "--reverse-model", models["reverse"], "--separator", "\n"),
        *("--beams", 2, "--expansions", 2, "--max-steps", 3, "--step-tokens", 8, *step),
    )
    assert result.returncode == 0, result.stderr
    (line,) = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert line["answer"] == "18"
    assert len(line["candidates"]) == 2
    assert line["beam_search"]["step"] == (step[1] if len(step) == 2 else "pattern [aeiou]")
    assert len(line["tree"]) >= 4
    assert "What is evaluated first?\n" in result.stdout
    assert result.stdout.count("<- best") == 1
    assert "1 questions searched" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--reverse-model", "{forward}"], "is a forward model"),
        (["--forward-model", "{reverse}"], "is a reverse model"),
        (["--beams", "0"], "--beams is 0"),
        (["--lambda", "2"], "--lambda is 2.0"),
        (["--step", "pattern"], "--step pattern and --step-pattern belong together"),
        (["--input", "absent.jsonl"], "absent.jsonl: no such file"),
    ],
)
def test_refusals(models: dict[str, Path], questions: Path, tmp_path: Path, change: list[str], message: str) -> None:
    flags = {
        "--forward-model": "{forward}",
        "--reverse-model": "{reverse}",
        "--input": "{questions}",
        "--output": "{output}",
    } | dict([change])
    names = {**models, "questions": questions, "output": tmp_path / "out.jsonl"}
    words = [str(value).format(**names) for pair in flags.items() for value in pair]
    result = run_tool("beam_search.py", *words, "--device", "cpu")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
