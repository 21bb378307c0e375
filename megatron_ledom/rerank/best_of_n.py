"""Best of N: score every candidate of a file, rank them, write them.

Owns the order of the work: everything that can be refused is refused before a model
is loaded, or, where it takes the tokenizer, before the first score; questions go
through the models in blocks so that memory doesn't grow with the file's length, and
the output appears when all of it is there. The formula is `reward.py`'s, the file
format `candidates.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.direction import ConditionedIds, Direction
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS
from megatron_ledom.inference.files import check_output, open_output
from megatron_ledom.inference.folder import check_direction, load_record
from megatron_ledom.log import Progress
from megatron_ledom.rerank.candidates import Candidate, Question, check_carried_logprobs, read_questions
from megatron_ledom.rerank.carried import FORWARD_LOGPROB, NUM_FORWARD_TOKENS
from megatron_ledom.rerank.reward import Normalize, TextLogprob, check_reverse_weight, rank_rewards, reverse_reward

if TYPE_CHECKING:  # torch comes with it, and costs seconds that a refusal should not take
    from megatron_ledom.inference.model import ForwardLM, ReverseLM, Score

# Enough candidates at a time to fill batches of nearly equal lengths.
QUESTIONS_PER_BLOCK = 256


@dataclass(frozen=True)
class RerankSettings:
    """Everything that decides a ranking, beside the candidates themselves.

    Attributes:
        reverse_model: folder of the reverse model.
        forward_model: folder of any forward Hugging Face causal LM. It scores every
            candidate, also those that carry a score. None: they must all carry one,
            unless `reverse_weight` is 1.
        reverse_weight: lambda, in [0, 1].
        normalize: what each log-probability is divided by.
        separator: put between question and answer; conditioned on, never scored.
        device: "auto", "cpu" or "cuda".
        assume_reverse: take a reverse model that does not say its direction.
        batch_tokens: most tokens in a batch.
    """

    reverse_model: Path
    forward_model: Path | None = None
    reverse_weight: float = 0.5
    normalize: Normalize = Normalize.NONE
    separator: str = ""
    device: str = "auto"
    assume_reverse: bool = False
    batch_tokens: int = DEFAULT_BATCH_TOKENS

    @property
    def assumed_direction(self) -> Direction | None:
        """What to take a reverse model for that doesn't say its direction."""
        return Direction.REVERSE if self.assume_reverse else None

    def describe(self) -> dict[str, Any]:
        """The settings as they are written beside every result."""
        return {
            "lambda": self.reverse_weight,
            "normalize": str(self.normalize),
            "separator": self.separator,
            "reverse_model": str(self.reverse_model),
            "forward_model": None if self.forward_model is None else str(self.forward_model),
        }


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate with its scores.

    Attributes:
        candidate: as it was read.
        index: its place in the file, from 0.
        answer_given_question: forward score; None where there is none and lambda is 1.
        question_given_answer: reverse score.
        reward: Reverse Reward.
    """

    candidate: Candidate
    index: int
    answer_given_question: TextLogprob | None
    question_given_answer: TextLogprob
    reward: float

    def to_record(self, rank: int) -> dict[str, Any]:
        """The object written for it; `rank` counts from 1."""
        forward, reverse = self.answer_given_question, self.question_given_answer
        return {
            **self.candidate.extra,
            "text": self.candidate.text,
            "rank": rank,
            # A file that is ranked again keeps the order in which its answers were drawn.
            "index": self.candidate.extra.get("index", self.index),
            "reward": self.reward,
            FORWARD_LOGPROB: forward and forward.logprob,
            NUM_FORWARD_TOKENS: forward and forward.num_tokens,
            "reverse_logprob": reverse.logprob,
            "num_reverse_tokens": reverse.num_tokens,
        }


def rank_questions(
    questions: Sequence[Question],
    reverse: ReverseLM,
    forward: ForwardLM | None,
    settings: RerankSettings,
    *,
    on_scored: Callable[[int], None] | None = None,
) -> Iterator[list[RankedCandidate]]:
    """Yield the candidates of each question, the highest reward first, in the order of the questions.

    Args:
        questions: as `read_questions` gives them.
        reverse: scores the question given the answer.
        forward: scores the answer given the question; None where the candidates carry that, or lambda is 1.
        settings: lambda, normalisation, separator; folders and device are not looked at.
        on_scored: called with the number of texts whenever some have been scored.

    Raises:
        InputError: question and answer are longer than a model's context; the message
            names the line and the candidate.
        UsageError: a score or length is needed that is not there.
    """
    for start in range(0, len(questions), QUESTIONS_PER_BLOCK):
        block = questions[start : start + QUESTIONS_PER_BLOCK]
        forward_scores = None if forward is None else iter(_score_answers(block, forward, settings, on_scored))
        reverse_scores = iter(_score_questions(block, reverse, settings, on_scored))
        for question in block:
            ranked = []
            for index, candidate in enumerate(question.candidates):
                carried = None if forward_scores is None else next(forward_scores)
                answer = _forward_logprob(candidate, carried)
                asked = _text_logprob(next(reverse_scores), question.text)
                reward = reverse_reward(
                    answer, asked, reverse_weight=settings.reverse_weight, normalize=settings.normalize
                )
                ranked.append(RankedCandidate(candidate, index, answer, asked, reward))
            yield [ranked[i] for i in rank_rewards([r.reward for r in ranked])]


def check_lengths(
    questions: Sequence[Question], reverse: ReverseLM, forward: ForwardLM | None, settings: RerankSettings
) -> None:
    """Refuse what does not fit into a model's context, all of it before the first score.

    Raises:
        InputError: as `rank_questions` would, after hours.
    """
    for question in questions:
        for candidate in question.candidates:
            _arrange_question(question, candidate, reverse, settings)
            if forward is not None:
                _arrange_answer(question, candidate, forward, settings)


def _arrange_answer(q: Question, c: Candidate, forward: ForwardLM, settings: RerankSettings) -> ConditionedIds:
    """Lay out the answer after question and separator."""
    return forward.arrange(c.text, q.text + settings.separator, what=c.where)


def _arrange_question(q: Question, c: Candidate, reverse: ReverseLM, settings: RerankSettings) -> ConditionedIds:
    """Lay out the question before separator and answer."""
    return reverse.arrange(q.text, settings.separator + c.text, what=c.where)


def _score_answers(
    block: Sequence[Question], forward: ForwardLM, settings: RerankSettings, on_scored: Callable[[int], None] | None
) -> list[Score]:
    """Return log P_F(answer given question + separator) of every candidate of the block, in order."""
    layouts = [_arrange_answer(q, c, forward, settings) for q in block for c in q.candidates]
    return forward.score(layouts, batch_tokens=settings.batch_tokens, on_batch=on_scored)


def _score_questions(
    block: Sequence[Question], reverse: ReverseLM, settings: RerankSettings, on_scored: Callable[[int], None] | None
) -> list[Score]:
    """Return log P_R(question given separator + answer) of every candidate of the block, in order."""
    layouts = [_arrange_question(q, c, reverse, settings) for q in block for c in q.candidates]
    return reverse.score(layouts, batch_tokens=settings.batch_tokens, on_batch=on_scored)


def _text_logprob(score: Score, text: str) -> TextLogprob:
    return TextLogprob(score.logprob, score.num_tokens, len(text))


def _forward_logprob(candidate: Candidate, score: Score | None) -> TextLogprob | None:
    """The forward model's score, or the one that the candidate carries."""
    if score is not None:
        return _text_logprob(score, candidate.text)
    if candidate.forward_logprob is None:
        return None
    return TextLogprob(candidate.forward_logprob, candidate.num_forward_tokens, len(candidate.text))


def rerank_file(source: Path, output: Path, settings: RerankSettings, *, overwrite: bool = False) -> tuple[int, int]:
    """Rank the candidates of a JSONL file by Reverse Reward.

    Args:
        source: questions with candidates, see docs/reverse_reward.md.
        output: the same lines in the same order, with ranked candidates; appears when it is complete.
        settings: models and options.
        overwrite: replace an output that exists.

    Returns:
        Numbers of questions and of candidates.

    Raises:
        InputError: a malformed line, a candidate that is too long, a folder that is not a model.
        DirectionError: a model that runs the wrong way.
        UsageError: an option that cannot work.
        OutputExistsError: the output exists and `overwrite` is not set.
    """
    questions = _check_all(source, output, settings, overwrite=overwrite)
    from megatron_ledom.inference.model import ForwardLM, ReverseLM

    reverse = ReverseLM.load(
        settings.reverse_model, device=settings.device, assume_direction=settings.assumed_direction
    )
    forward = None
    if settings.forward_model is not None:
        forward = ForwardLM.load(settings.forward_model, device=settings.device)
    check_lengths(questions, reverse, forward, settings)
    num_candidates = sum(len(q.candidates) for q in questions)
    progress = Progress("score", num_candidates * (1 if forward is None else 2), "texts")
    with open_output(output) as file:
        ranked = rank_questions(questions, reverse, forward, settings, on_scored=progress.update)
        for question, candidates in zip(questions, ranked, strict=True):
            records = [candidate.to_record(rank) for rank, candidate in enumerate(candidates, start=1)]
            line = {**question.record, "candidates": records, "reverse_reward": settings.describe()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    progress.close()
    return len(questions), num_candidates


def _check_all(source: Path, output: Path, settings: RerankSettings, *, overwrite: bool) -> list[Question]:
    """Everything that can be refused without loading a model; returns the questions."""
    check_reverse_weight(settings.reverse_weight)
    check_output(output, overwrite=overwrite)
    questions = read_questions(source)
    check_direction(load_record(settings.reverse_model), Direction.REVERSE, settings.assumed_direction)
    if settings.forward_model is not None:
        check_direction(load_record(settings.forward_model), Direction.FORWARD)
    elif settings.reverse_weight < 1.0:
        check_carried_logprobs(questions, need_num_tokens=settings.normalize is Normalize.TOKEN)
    return questions
