"""Final answers: found, compared, grouped, with the real math-verify."""

from __future__ import annotations

import pytest

from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.rerank.answers import AnswerChecker


@pytest.fixture(scope="module")
def checker() -> AnswerChecker:
    return AnswerChecker()


@pytest.mark.parametrize(
    ("gold", "text", "is_right"),
    [
        ("18", "9 * 2 = 18.\n#### 18", True),
        ("18", "9 * 2 = 18.\n#### 19", False),
        ("18", "#### 17\nNo:\n#### 18", True),
        ("1250", "#### 1,250", True),
        (1250, "#### 1250.0", True),
        ("0.5", r"So it is \boxed{\frac{1}{2}}", True),
        (r"\frac{1}{2}", "#### 1/2", True),
        (r"\sqrt{2}", r"#### \sqrt{2}", True),
        ("18", "The answer is 18.", True),
        ("18", "It is 18 or 19.", False),
        ("18", "I do not know.", False),
        ("18", "#### none", False),
        ("9 * 2 = 18\n#### 18", "#### 18", True),
        ("-3", "#### -3", True),
        ("-3", "#### 3", False),
    ],
)
def test_answers_are_judged_as_a_reader_would(checker: AnswerChecker, gold: object, text: str, is_right: bool) -> None:
    assert checker.is_equal(checker.check_gold(gold, "here"), checker.find(text)) is is_right


def test_equal_answers_form_groups(checker: AnswerChecker) -> None:
    texts = ["#### 0.5", "#### 7", "no idea", r"\boxed{\frac{1}{2}}", "#### 1/2", "7 it is", "#### 8"]
    assert checker.group([checker.find(text) for text in texts]) == [0, 1, -1, 0, 0, 1, 2]


def test_a_pattern_decides_alone() -> None:
    checker = AnswerChecker(r"answer: (\S+)")
    assert checker.find("#### 5\nanswer: 4\nanswer: 6") == "6"
    assert checker.find("#### 5") is None
    assert checker.is_equal(checker.check_gold("6", "here"), "6")
    with pytest.raises(UsageError, match="--answer-pattern \\(: not a regular expression"):
        AnswerChecker("(")


@pytest.mark.parametrize("gold", ["", "yes", None, [18], True])
def test_a_gold_answer_that_cannot_be_compared_is_refused(checker: AnswerChecker, gold: object) -> None:
    with pytest.raises(InputError, match=r"line 4: field 'answer' is .* finds no answer in it"):
        checker.check_gold(gold, "q.jsonl, line 4: field 'answer'")
