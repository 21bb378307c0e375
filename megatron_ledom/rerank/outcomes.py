"""Ranked files as arrays: which sample is right, which samples agree, what each of them scored.

The scores are those that tools/rerank.py wrote; no model is needed. Shape letters: P problems,
N samples of each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom.errors import InputError
from megatron_ledom.log import Progress
from megatron_ledom.rerank.answers import AnswerChecker
from megatron_ledom.rerank.candidates import GREEDY_MARK, Candidate, Question, read_questions
from megatron_ledom.rerank.carried import FORWARD_LOGPROB, NUM_FORWARD_TOKENS
from megatron_ledom.rerank.reward import Normalize

MISSING = -1e12
"""Score of a sample that is not there (a blank answer is left out when it is drawn): wrong, and never preferred."""


@dataclass(frozen=True)
class Outcomes:
    """One ranked file.

    Attributes:
        path: the file.
        problems: the questions' texts, [P].
        right: whether a sample's final answer is the gold one; bool [P, N].
        groups: samples of one problem with equal final answers share a number, -1: no answer; int [P, N].
        forward: log P_F(answer given question), for every normalisation that the file allows (per token only
            where every candidate says its tokens); float64 [P, N].
        reverse: log P_R(question given answer), likewise.
        greedy_right: 1 or 0, nan where no candidate is marked greedy; float64 [P].
        num_missing: samples that a question has fewer than the one with most; they count as wrong.
        settings: `reverse_reward` of the first line: how the file was ranked.
    """

    path: Path
    problems: tuple[str, ...]
    right: np.ndarray
    groups: np.ndarray
    forward: dict[Normalize, np.ndarray]
    reverse: dict[Normalize, np.ndarray]
    greedy_right: np.ndarray
    num_missing: int
    settings: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.right.shape[1])

    def is_held_out(self, share: float) -> np.ndarray:
        """Which problems choose lambda and normalisation; the same question always lands on the same side; bool [P]."""
        digests = [hashlib.sha256(problem.encode()).digest() for problem in self.problems]
        return np.array([int.from_bytes(d[:8]) < share * 2**64 for d in digests])


def read_outcomes(path: Path, checker: AnswerChecker, *, answer_field: str = "answer") -> Outcomes:
    """Read a file that tools/rerank.py wrote and check every answer.

    Args:
        path: ranked JSONL whose lines carry the gold answer.
        checker: compares answers.
        answer_field: where a line has its gold answer.

    Raises:
        InputError: a malformed line, no gold answer, a candidate without a score, nowhere two samples.
    """
    questions = read_questions(path)
    samples = [_sampled(question) for question in questions]
    num_samples = max(map(len, samples))
    if num_samples < 2:
        raise InputError(f"{path}: no question has two samples or more, so that there is nothing to choose among")
    progress = Progress(f"check {path.name}", len(questions), "questions")
    right = np.zeros((len(questions), num_samples), dtype=bool)
    groups = np.full((len(questions), num_samples), -1)
    greedy_right = np.full(len(questions), np.nan)
    for row, (question, chosen) in enumerate(zip(questions, samples, strict=True)):
        gold = _read_gold(question, checker, answer_field)
        answers = [checker.find(c.text) for c in chosen]
        right[row, : len(chosen)] = [checker.is_equal(gold, answer) for answer in answers]
        groups[row, : len(chosen)] = checker.group(answers)
        sampled = question.record.get("sampled")
        if isinstance(sampled, dict) and sampled.get(GREEDY_MARK) is True:
            greedy_right[row] = 0  # unless it is there: a blank answer was left out
        for candidate in question.candidates:
            if candidate.extra.get(GREEDY_MARK) is True:
                greedy_right[row] = checker.is_equal(gold, checker.find(candidate.text))
        progress.update(1)
    progress.close()
    settings = questions[0].record.get("reverse_reward")
    return Outcomes(
        path=path,
        problems=tuple(question.text for question in questions),
        right=right,
        groups=groups,
        forward=_scores(samples, "forward", [[len(c.text) for c in row] for row in samples]),
        reverse=_scores(
            samples, "reverse", [[len(q.text)] * len(row) for q, row in zip(questions, samples, strict=True)]
        ),
        greedy_right=greedy_right,
        num_missing=num_samples * len(questions) - sum(map(len, samples)),
        settings=settings if isinstance(settings, dict) else {},
    )


def _read_gold(question: Question, checker: AnswerChecker, answer_field: str) -> str:
    if answer_field not in question.record:
        known = ", ".join(map(repr, question.record))
        raise InputError(f"{question.where}: no field {answer_field!r} with the gold answer; fields found: {known}")
    return checker.check_gold(question.record[answer_field], f"{question.where}: field {answer_field!r}")


def _sampled(question: Question) -> list[Candidate]:
    """The samples in the order in which they were drawn, whatever their rank."""
    drawn = [c for c in question.candidates if c.extra.get(GREEDY_MARK) is not True]
    return sorted(drawn, key=lambda c: c.extra.get("index", 0))


def _scores(
    samples: Sequence[Sequence[Candidate]], direction: str, num_chars: Sequence[Sequence[int]]
) -> dict[Normalize, np.ndarray]:
    """Log-probabilities under every normalisation that is possible; float64 [P, N] each."""
    candidates = [c for row in samples for c in row]
    total = np.array([_number(c, f"{direction}_logprob") for c in candidates])
    lengths = {
        Normalize.NONE: np.ones(len(candidates)),
        Normalize.CHAR: np.array([n for row in num_chars for n in row]),
    }
    if all(_field(c, f"num_{direction}_tokens") is not None for c in candidates):
        lengths[Normalize.TOKEN] = np.array([_number(c, f"num_{direction}_tokens") for c in candidates])
    shape = (len(samples), max(map(len, samples)))
    is_there = np.arange(shape[1]) < np.array([[len(row)] for row in samples])
    scores = {normalize: np.full(shape, MISSING) for normalize in lengths}
    for normalize, length in lengths.items():
        scores[normalize][is_there] = total / length
    return scores


def _field(candidate: Candidate, key: str) -> Any:
    own = {FORWARD_LOGPROB: candidate.forward_logprob, NUM_FORWARD_TOKENS: candidate.num_forward_tokens}
    return own[key] if key in own else candidate.extra.get(key)


def _number(candidate: Candidate, key: str) -> float:
    value = _field(candidate, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{candidate.where}: {key} is {value!r}. Score the file with tools/rerank.py first")
    return float(value)
