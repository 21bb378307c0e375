"""Questions in, the same questions with sampled answers out: the file that tools/rerank.py ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.direction import Direction
from megatron_ledom.inference.files import check_output, open_output
from megatron_ledom.inference.folder import check_direction, load_record
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.log import Progress
from megatron_ledom.rerank.candidates import GREEDY_MARK, Question, read_unanswered
from megatron_ledom.rerank.steps import FindEnd, build_pattern_end

if TYPE_CHECKING:  # torch comes with it
    from megatron_ledom.inference.model import ForwardLM

DEFAULT_BATCH_ROWS = 128
"""Answers grown at a time: a small model on a CPU gains little beyond, and the cache grows with it."""
QUESTIONS_PER_BLOCK = 64  # questions of similar length go through the model together


@dataclass(frozen=True)
class GenerationSettings:
    """What decides the answers, beside the questions.

    Attributes:
        model: Hugging Face folder of a forward model.
        sampling: number, length, temperature and seed of the samples.
        separator: put between question and answer; give it to tools/rerank.py too.
        stop_pattern: regular expression; an answer ends with its first match that has something to read before it.
        greedy: also write the greedy answer, marked "greedy": true.
        batch_rows: most answers grown at a time.
        device: "auto", "cpu" or "cuda".
    """

    model: Path
    sampling: Sampling
    separator: str = ""
    stop_pattern: str | None = None
    greedy: bool = True
    batch_rows: int = DEFAULT_BATCH_ROWS
    device: str = "auto"

    def describe(self) -> dict[str, Any]:
        """As it is written beside the answers."""
        s = self.sampling
        return {
            "model": str(self.model),
            "num_samples": s.num_samples,
            "max_new_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "seed": s.seed,
            "separator": self.separator,
            "stop_pattern": self.stop_pattern,
            GREEDY_MARK: self.greedy,
        }


def sample_file(
    source: Path, output: Path, settings: GenerationSettings, *, overwrite: bool = False
) -> tuple[int, int]:
    """Sample answers to every question of a JSONL file.

    Args:
        source: one object with `question` or `prompt` a line; other fields are kept.
        output: the same lines with `candidates`; appears when it is complete.
        settings: model and sampling.
        overwrite: replace an output that exists.

    Returns:
        Numbers of questions and of blank answers, which are left out: they can be neither scored nor right. A
        question for which there is nothing else has no candidates, and counts as answered wrongly in an evaluation.

    Raises:
        InputError: a malformed line, a question too long for the model.
        UsageError: `stop_pattern` is no regular expression.
        DirectionError: a reverse model.
        OutputExistsError: the output exists and `overwrite` is not set.
    """
    check_output(output, overwrite=overwrite)
    find_end = None if settings.stop_pattern is None else build_pattern_end(settings.stop_pattern, "--stop-pattern")
    questions = read_unanswered(source)
    check_direction(load_record(settings.model), Direction.FORWARD)
    from megatron_ledom.inference.model import ForwardLM

    lm = ForwardLM.load(settings.model, device=settings.device)
    _check_lengths(lm, questions, settings)
    num_answers = settings.sampling.num_samples + settings.greedy
    progress = Progress("sample", num_answers * len(questions), "answers")
    num_blank = 0
    with open_output(output) as file:
        for start in range(0, len(questions), QUESTIONS_PER_BLOCK):
            block = questions[start : start + QUESTIONS_PER_BLOCK]
            for question, answers in zip(block, _answer(lm, block, start, settings, find_end, progress), strict=True):
                kept = [answer for answer in answers if answer["text"].strip()]
                num_blank += len(answers) - len(kept)
                line = {**question.record, "candidates": kept, "sampled": settings.describe()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    progress.close()
    return len(questions), num_blank


def _check_lengths(lm: ForwardLM, questions: Sequence[Question], settings: GenerationSettings) -> None:
    """Refuse a question that is too long before the first answer is drawn."""
    from megatron_ledom.rerank.sampler import encode_prompts

    prompts = [question.text + settings.separator for question in questions]
    encode_prompts(lm, prompts, settings.sampling, what=lambda index: questions[index].where)


def _answer(
    lm: ForwardLM,
    block: Sequence[Question],
    start: int,
    settings: GenerationSettings,
    find_end: FindEnd | None,
    progress: Progress,
) -> list[list[dict[str, Any]]]:
    """Answer the questions of one block: the samples, then the greedy answer."""
    from megatron_ledom.rerank.sampler import continue_texts

    # Every block has a seed of its own, and a file the same samples whatever comes after it.
    sampling = replace(settings.sampling, seed=settings.sampling.seed + start)
    kinds: list[tuple[Sampling, dict[str, bool]]] = [(sampling, {})]
    if settings.greedy:
        kinds.append((replace(sampling, greedy=True, num_samples=1), {GREEDY_MARK: True}))
    answers: list[list[dict[str, Any]]] = [[] for _ in block]
    for kind, mark in kinds:
        written = continue_texts(
            lm,
            [question.text + settings.separator for question in block],
            kind,
            find_end=find_end,
            batch_rows=settings.batch_rows,
            on_batch=progress.update,
            what=lambda index: block[index].where,
        )
        for row, continuations in zip(answers, written, strict=True):
            for c in continuations:
                is_stopped = find_end is not None and find_end(c.text) is not None
                row.append({"text": c.text, "finished": c.finished or is_stopped, **mark})
    return answers
