"""The reversed few-shot prompt: what the model is given, what it says, and when it has said it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.errors import DirectionError, InputError, UsageError
from megatron_ledom.evaluation.few_shot import (
    FewShotSettings,
    Problem,
    evaluate_few_shot,
    is_same_answer,
    question_prompt,
    read_answer,
    solve,
)
from megatron_ledom.inference import ReverseLM

SHOWN = [Problem("What is 1 + 1?", "2", "One and one is two."), Problem("What is 2 + 1?", "3", "Two and one is three.")]
CHAIN = "Five and one is six.\nSo it is six."


def test_the_prompt_is_the_papers_below_the_chain() -> None:
    assert question_prompt("What is 5 + 1?", SHOWN) == (
        "\nThe above is the thought chain.\nQuestion: What is 5 + 1?\n\n"
        "2 is the answer of the following question.\nOne and one is two.\nThe above is the thought chain.\n"
        "Question: What is 1 + 1?\n\n"
        "3 is the answer of the following question.\nTwo and one is three.\nThe above is the thought chain.\n"
        "Question: What is 2 + 1?"
    )


@pytest.mark.parametrize(
    ("written", "is_complete", "expected"),
    [
        (CHAIN, False, None),
        (f" is the answer of the following question.\n{CHAIN}", False, None),
        (f" is the answer of the following question.\n{CHAIN}", True, None),
        (f"6 is the answer of the following question.\n{CHAIN}", False, None),  # it may become 16
        (f"6 is the answer of the following question.\n{CHAIN}", True, "6"),
        (f"\n16 is the answer of the following question.\n{CHAIN}", False, "16"),
        (f"more\n\n$1,600 is the answer of the following question.\n{CHAIN}", False, "$1,600"),
        ("8 is the answer of the following question.\nx\n6 is the answer of the following question.\ny", False, "6"),
    ],
)
def test_the_answer_is_said_when_nothing_can_be_put_before_it(
    written: str, is_complete: bool, expected: str | None
) -> None:
    assert read_answer(written, is_complete=is_complete) == expected


@pytest.mark.parametrize(
    ("found", "right", "is_same"),
    [("12", "12.0", True), ("$1,200", "1200", True), ("50%", "50", True), ("12", "21", False), ("", "0", False)],
)
def test_answers_are_compared_as_numbers_where_they_are(found: str, right: str, is_same: bool) -> None:
    assert is_same_answer(found, right) is is_same


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("reverse"), tokenizer_folder, "reverse")


def test_a_model_that_says_it_is_stopped_and_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own greedy text, with the words of the prompt put into it: writing stops where they are complete."""
    lm = ReverseLM.load(model, device="cpu")
    problem = Problem("What is 5 + 1?", "6")
    whole = lm.write_before(question_prompt(problem.question, SHOWN[:1]), max_new_tokens=60, greedy=True)[0]
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    monkeypatch.setattr(
        "megatron_ledom.evaluation.few_shot.read_answer",
        lambda earlier, is_complete: "6" if middle in earlier else None,
    )
    result = solve(lm, problem, SHOWN[:1], 60)
    assert result["is_right"]
    assert whole.endswith(result["written"])
    assert middle in result["written"]
    assert len(result["written"]) < len(whole)


def write(path: Path, problems: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def test_a_file_is_evaluated_and_bad_ones_are_refused(model: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    shown = write(tmp_path / "shown.jsonl", [vars(problem) for problem in SHOWN])
    asked = write(
        tmp_path / "asked.jsonl", [{"id": str(n), "question": f"{n} + 1?", "answer": str(n)} for n in range(3)]
    )
    settings = FewShotSettings(model, num_shots=1, max_new_tokens=8, device="cpu")
    output = tmp_path / "out.jsonl"
    found = evaluate_few_shot(asked, shown, output, settings)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    assert (found["problems"], found["right"], found["low"]) == (3, 0, 0.0)
    assert all(line["written"] and line["is_right"] is False for line in lines)
    other = {"num_shots": 1, "max_new_tokens": 8, "device": "cpu"}
    with pytest.raises(UsageError, match="--num-shots 3: 2 demonstrations were given"):
        evaluate_few_shot(asked, shown, output, FewShotSettings(model, num_shots=3), overwrite=True)
    with pytest.raises(InputError, match=r"asked.jsonl, problem 1 with 2 demonstrations .* at most 256"):
        evaluate_few_shot(asked, shown, output, FewShotSettings(model, num_shots=2, device="cpu"), overwrite=True)
    with pytest.raises(InputError, match=r"asked.jsonl, line 1: no field 'chain'"):
        evaluate_few_shot(shown, asked, output, FewShotSettings(model, **other), overwrite=True)  # type: ignore[arg-type]
    forward = save_random_model(tmp_path / "forward", tokenizer_folder, "forward")
    with pytest.raises(DirectionError, match="is a forward model"):
        evaluate_few_shot(asked, shown, output, FewShotSettings(forward), overwrite=True)
