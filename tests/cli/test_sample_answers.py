"""tools/sample_answers.py as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.rerank.answers import AnswerChecker
from megatron_ledom.rerank.outcomes import read_outcomes
from megatron_ledom.testing import run_tool


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_random_model(root / name, tokenizer_folder, name) for name in ("reverse", "forward")}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [{"question": "What is evaluated first?", "answer": "18"}, {"prompt": "What raises NameError?", "id": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_samples_and_a_greedy_answer_are_written_for_each_question(
    models: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    flags = ["--num-samples", 3, "--max-new-tokens", 12, "--separator", "\n", "--seed", 4, "--device", "cpu"]
    flags += ["--stop-pattern", "[aeiou]"]
    command = ["sample_answers.py", "--model", models["forward"], "--input", questions]
    result = run_tool(*command, "--output", tmp_path / "out.jsonl", *flags)  # type: ignore[arg-type]
    assert result.returncode == 0, result.stderr
    assert "2 questions, 3 samples each" in result.stdout
    assert "sample: 8 answers in" in result.stderr
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (first["answer"], second["id"]) == ("18", 2)
    for line in (first, second):
        assert [c.get("greedy", False) for c in line["candidates"]] == [False, False, False, True]
        assert line["sampled"]["separator"] == "\n"
        assert line["sampled"]["seed"] == 4
        assert all(re.search("[aeiou]", c["text"][:-1]) is None for c in line["candidates"])
        assert any(c["finished"] for c in line["candidates"])
    ranked = run_tool(
        "rerank.py",
        *("--input", tmp_path / "out.jsonl", "--output", tmp_path / "ranked.jsonl", "--device", "cpu"),
        *("--reverse-model", models["reverse"], "--forward-model", models["forward"], "--separator", "\n"),
    )
    assert ranked.returncode == 0, ranked.stderr


def test_a_question_with_blank_answers_alone_stays_and_counts_as_wrong(models: dict[str, Path], tmp_path: Path) -> None:
    """Written as the tool writes it where every answer of the second question was blank."""
    sampled = {"model": "m", "greedy": False}
    lines = [
        {
            "question": "Q",
            "answer": "18",
            "candidates": [{"text": " #### 18"}, {"text": " #### 1"}],
            "sampled": sampled,
        },
        {"question": "R", "answer": "18", "candidates": [], "sampled": sampled},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranked = run_tool(
        "rerank.py",
        *("--input", tmp_path / "in.jsonl", "--output", tmp_path / "ranked.jsonl", "--device", "cpu"),
        *("--reverse-model", models["reverse"], "--forward-model", models["forward"]),
    )
    assert ranked.returncode == 0, ranked.stderr
    assert [len(json.loads(line)["candidates"]) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()] == [
        2,
        0,
    ]
    outcomes = read_outcomes(tmp_path / "ranked.jsonl", AnswerChecker())
    assert outcomes.right.tolist() in ([[True, False], [False, False]], [[False, True], [False, False]])
    assert outcomes.num_missing == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "{reverse}"], "is a reverse model"),
        (["--stop-pattern", "("], "--stop-pattern (: not a regular expression"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--max-new-tokens", "300"], "line 1 and 300 new tokens"),
        (["--input", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--input", "{answered}"], "line 1: there are answers already, under 'candidates'"),
        (["--output", "{questions}"], "exists"),
    ],
)
def test_refusals(models: dict[str, Path], questions: Path, tmp_path: Path, change: list[str], message: str) -> None:
    answered = tmp_path / "answered.jsonl"
    answered.write_text(json.dumps({"question": "2+2?", "candidates": ["4"]}) + "\n")
    flags = {"--model": "{forward}", "--input": "{questions}", "--output": "{output}"} | dict([change])
    names = {**models, "questions": questions, "answered": answered, "output": tmp_path / "out.jsonl"}
    words = [str(value).format(**names) for pair in flags.items() for value in pair]
    result = run_tool("sample_answers.py", *words, "--device", "cpu")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
