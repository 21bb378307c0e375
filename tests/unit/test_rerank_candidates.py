"""The file of questions and candidates: what is read, what is refused and how it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.errors import InputError
from megatron_ledom.rerank.candidates import check_carried_logprobs, read_questions


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_both_forms_of_candidates_and_both_names_of_the_question_are_read(tmp_path: Path) -> None:
    scored = {"text": "five", "forward_logprob": -2, "num_forward_tokens": 1, "source": "a"}
    path = write(
        tmp_path / "q.jsonl",
        {"question": "2+2?", "candidates": ["four", scored], "id": 7},
        {"prompt": "3+3?", "candidates": ["six"]},
    )
    first, second = read_questions(path)
    assert (first.text, second.text) == ("2+2?", "3+3?")
    assert first.record["id"] == 7
    four, five = first.candidates
    assert (four.text, four.forward_logprob, four.num_forward_tokens, four.extra) == ("four", None, None, {})
    assert (five.text, five.forward_logprob, five.num_forward_tokens) == ("five", -2.0, 1)
    assert five.extra == {"source": "a"}
    assert five.where == f"{path}, line 1, candidate 2"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"candidates": ["a"]}, "line 2: no field 'question'; fields found: 'candidates'"),
        ({"question": " ", "candidates": ["a"]}, "line 2: field 'question' is empty"),
        ({"question": 3, "candidates": ["a"]}, "line 2: field 'question' is 3, a text is needed"),
        ({"question": "a", "prompt": "b", "candidates": ["a"]}, "line 2: both 'question' and 'prompt'"),
        ({"question": "a"}, "line 2: no field 'candidates'"),
        ({"question": "a", "candidates": []}, r"line 2: field 'candidates' is \[\]"),
        ({"question": "a", "candidates": "b"}, "line 2: field 'candidates' is 'b'"),
        ({"question": "a", "candidates": ["b", ""]}, "line 2, candidate 2: field 'text' is empty"),
        ({"question": "a", "candidates": ["b", {"text": "\n"}]}, "line 2, candidate 2: field 'text' is empty"),
        ({"question": "a", "candidates": [None]}, "line 2, candidate 1: None is neither"),
        ({"question": "a", "candidates": [{"answer": "b"}]}, "candidate 1: no field 'text'; fields found: 'answer'"),
        ({"question": "a", "candidates": [{"text": "b", "forward_logprob": "-1"}]}, "forward_logprob is '-1'"),
        ({"question": "a", "candidates": [{"text": "b", "forward_logprob": 0.5}]}, "forward_logprob is 0.5"),
        ({"question": "a", "candidates": [{"text": "b", "forward_logprob": float("nan")}]}, "forward_logprob is nan"),
        ({"question": "a", "candidates": [{"text": "b", "num_forward_tokens": 0}]}, "num_forward_tokens is 0"),
    ],
)
def test_malformed_lines_are_refused_by_number(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "2+2?", "candidates": ["four"]}, record)
    with pytest.raises(InputError, match=message):
        read_questions(path)


def test_a_file_without_a_question_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="has no question"):
        read_questions(path)


def test_without_a_forward_model_every_candidate_must_carry_its_score(tmp_path: Path) -> None:
    carried = {"text": "four", "forward_logprob": -1.0}
    questions = read_questions(write(tmp_path / "q.jsonl", {"question": "2+2?", "candidates": [carried, carried]}))
    check_carried_logprobs(questions, need_num_tokens=False)
    with pytest.raises(InputError, match="line 1, candidate 1: no num_forward_tokens"):
        check_carried_logprobs(questions, need_num_tokens=True)
    questions = read_questions(write(tmp_path / "q.jsonl", {"question": "2+2?", "candidates": [carried, "five"]}))
    with pytest.raises(InputError, match="line 1, candidate 2: no forward_logprob, and no --forward-model"):
        check_carried_logprobs(questions, need_num_tokens=False)
