"""Questions with candidate answers, as JSONL: what is read and what is written.

One question a line; the schema, with an example, is in docs/reverse_reward.md:

    in   {"question": "...", "candidates": ["...", {"text": "...", "forward_logprob": -7.1}], ...}
         or vLLM's "outputs", or OpenAI's "choices", with the log-probabilities that these carry (`carried.py`)
    out  the same fields, the candidates as objects in order of their reward, and "reverse_reward":
         the settings that produced them

It checks every line before a model is loaded; it doesn't compute anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ledom.errors import InputError
from megatron_ledom.inference.files import read_records, read_text_field
from megatron_ledom.rerank.carried import FORWARD_LOGPROB, NUM_FORWARD_TOKENS, read_carried

QUESTION_KEYS = ("question", "prompt")
CANDIDATE_KEYS = ("candidates", "outputs", "choices")
"""Ours, vLLM's and OpenAI's name for the list of answers."""
GREEDY_MARK = "greedy"
"""Field of a candidate; true marks the greedy answer, which is a baseline and none of the N samples."""


@dataclass(frozen=True)
class Candidate:
    """One candidate answer.

    Attributes:
        text: the answer.
        where: file, line and number of the candidate, for messages.
        forward_logprob: log P(text given the question) that came with it, natural logarithm, or None.
        num_forward_tokens: the number of tokens behind that, or None.
        extra: every other field, kept as it came.
    """

    text: str
    where: str
    forward_logprob: float | None = None
    num_forward_tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One line of the file.

    Attributes:
        text: the question.
        candidates: in the order of the file; none where it is still to be answered, or where tools/sample_answers.py
            drew nothing but blank answers.
        where: file and line, for messages.
        record: the line as it was read, without the candidates.
    """

    text: str
    candidates: tuple[Candidate, ...]
    where: str
    record: dict[str, Any]


def read_questions(path: str | Path) -> list[Question]:
    """Read and check a file of questions with candidates.

    Raises:
        InputError: the file is missing or has no question, or a line is malformed: no
            question, no candidates, an empty answer, a log-probability that can't be one.
            The message names file, line and candidate.
    """
    questions = [_read_question(record, f"{path}, line {number}") for number, record in read_records(path)]
    if not questions:
        raise InputError(f"{path} has no question. One JSON object a line is needed, see docs/reverse_reward.md")
    return questions


def read_unanswered(path: str | Path) -> list[Question]:
    """Read a file of questions that are to be answered: as `read_questions`, without candidates.

    Raises:
        InputError: as `read_questions`; or a line has answers already.
    """
    questions = []
    for number, record in read_records(path):
        where = f"{path}, line {number}"
        taken = [key for key in CANDIDATE_KEYS if key in record]
        if taken:
            raise InputError(f"{where}: there are answers already, under {taken[0]!r}. Remove them, or rank them")
        questions.append(Question(_read_text(record, where), (), where, record))
    if not questions:
        raise InputError(f"{path} has no question. One JSON object a line is needed, see docs/reverse_reward.md")
    return questions


def _read_text(record: dict[str, Any], where: str) -> str:
    present = [key for key in QUESTION_KEYS if key in record]
    if len(present) == 2:
        raise InputError(f"{where}: both 'question' and 'prompt' are there. Keep one")
    return read_text_field(record, present[0] if present else QUESTION_KEYS[0], where)


def _read_question(record: dict[str, Any], where: str) -> Question:
    text = _read_text(record, where)
    key = _find_candidates(record, where)
    entries = record[key]
    if not isinstance(entries, list) or not (entries or "sampled" in record):
        raise InputError(f"{where}: field {key!r} is {entries!r}. A list of one or more answers is needed")
    read = tuple(_read_candidate(entry, f"{where}, candidate {n}") for n, entry in enumerate(entries, start=1))
    return Question(text, read, where, {k: v for k, v in record.items() if k != key})


def _find_candidates(record: dict[str, Any], where: str) -> str:
    """The name under which this line lists its answers."""
    present = [key for key in CANDIDATE_KEYS if key in record]
    if len(present) > 1:
        raise InputError(f"{where}: answers under {' and '.join(map(repr, present))}. Keep one of them")
    if not present:
        raise InputError(f"{where}: no field 'candidates'. A list of one or more answers is needed")
    return present[0]


def _read_candidate(entry: object, where: str) -> Candidate:
    fields: dict[str, Any] = {"text": entry} if isinstance(entry, str) else entry if isinstance(entry, dict) else {}
    if not fields:
        raise InputError(f'{where}: {entry!r} is neither a text nor an object with a field "text"')
    message = fields.get("message")  # OpenAI's chat completions
    source, key = (message, "content") if "text" not in fields and isinstance(message, dict) else (fields, "text")
    carried = read_carried(fields, where)
    known = {"text", FORWARD_LOGPROB, NUM_FORWARD_TOKENS}
    return Candidate(
        text=read_text_field(source, key, where),
        where=where,
        forward_logprob=carried.logprob,
        num_forward_tokens=carried.num_tokens,
        extra={key: value for key, value in fields.items() if key not in known},
    )


def check_carried_logprobs(questions: list[Question], *, need_num_tokens: bool) -> None:
    """Check that no forward model is needed: every candidate carries its own score.

    Args:
        questions: as read.
        need_num_tokens: also ask for the number of tokens, to divide by.

    Raises:
        InputError: a candidate without them; the message names it.
    """
    for question in questions:
        for candidate in question.candidates:
            if candidate.forward_logprob is None:
                raise InputError(
                    f"{candidate.where}: no {FORWARD_LOGPROB}, and no --forward-model to compute it. Give one of them"
                )
            if need_num_tokens and candidate.num_forward_tokens is None:
                raise InputError(
                    f"{candidate.where}: no {NUM_FORWARD_TOKENS}, which --normalize token divides {FORWARD_LOGPROB} "
                    "by. Add it, normalize by char, or give --forward-model"
                )
