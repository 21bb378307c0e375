"""Scoring a file of pairs: JSONL in, the same lines with their scores out.

    read and check all -> load -> tokenise and check lengths of all -> block: known? else score, keep -> write -> rename

Everything that can be refused is refused before the first score. Finished scores go to a cache
(`score_cache.py`), so that the same command goes on after a kill. Blocks bound memory, whatever the file holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS
from megatron_ledom.inference.files import check_output, open_output, read_records, read_text_field
from megatron_ledom.inference.folder import FolderRecord, check_direction, load_record
from megatron_ledom.inference.score_cache import ScoreCache, model_identity, score_key
from megatron_ledom.log import Progress

if TYPE_CHECKING:  # torch comes with it, and costs seconds that a refusal should not take
    from megatron_ledom.inference.model import DirectedLM, Score

# Batches in a block: enough to find sequences of one length, few enough to lose little by a kill.
BATCHES_PER_BLOCK = 16


@dataclass(frozen=True)
class ScoreSettings:
    """What to score, and how.

    Attributes:
        model: folder of a model of either direction.
        earlier_key, later_key: fields of the two texts.
        separator: put between them; read with the text that is conditioned on, never scored.
        closed: also score that the document begins (reverse) or ends (forward) with the scored text.
        windowed: read what is longer than the context in overlapping windows; otherwise it is refused.
        field: of the output, for the scores.
        with_tokens: write the log-probability of every token, too.
        cache: file of finished scores, or None.
        device: "auto", "cpu" or "cuda".
        assume_reverse: take a model that does not say its direction for a reverse one.
        batch_tokens: most tokens in a batch.
        dtype: of the weights, by torch's name; "auto" is float32 on a CPU and as saved on a GPU.
    """

    model: Path
    earlier_key: str = "earlier"
    later_key: str = "later"
    separator: str = ""
    closed: bool = False
    windowed: bool = False
    field: str = "score"
    with_tokens: bool = False
    cache: Path | None = None
    device: str = "auto"
    assume_reverse: bool = False
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    dtype: str = "auto"


@dataclass(frozen=True)
class ScoreCounts:
    """What was done: pairs written, pairs whose score was known, tokens scored, the model's direction."""

    num_pairs: int
    num_known: int
    num_tokens: int
    direction: Direction


@dataclass(frozen=True)
class _Pair:
    record: dict[str, Any]
    where: str
    target: str
    given: str


def score_file(source: Path, output: Path, settings: ScoreSettings, *, overwrite: bool = False) -> ScoreCounts:
    """Score the pairs of a JSONL file: log P(earlier | later) by a reverse model, the other way round by a forward one.

    Args:
        source: objects with the two texts, see docs/scoring.md.
        output: the same lines in the same order, each with its score; appears when it is complete.
        settings: model and options.
        overwrite: replace an output that exists.

    Raises:
        InputError: a malformed line, a pair that is too long, a folder that is not a model, a cache that is none.
        DirectionError: a model that does not run the way that was said.
        UsageError: an option that cannot work.
        OutputExistsError: the output exists and `overwrite` is not set.
    """
    check_output(output, overwrite=overwrite)
    if settings.batch_tokens < 1:
        raise UsageError(f"--batch-tokens is {settings.batch_tokens}, it must be 1 or more")
    record = load_record(settings.model)
    direction = _choose_direction(record, settings)
    num_pairs = sum(1 for _ in _read_pairs(source, settings, direction))
    if num_pairs == 0:
        raise InputError(f"{source} has no pair. One JSON object a line is needed, see docs/scoring.md")
    import torch

    from megatron_ledom.inference.model import ForwardLM, ReverseLM

    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    kind = ReverseLM if direction is Direction.REVERSE else ForwardLM
    identity = model_identity(record.folder)
    lm = kind.load(record.folder, device=settings.device, dtype=dtype, assume_direction=_assumed(settings))
    for pair in _read_pairs(source, settings, direction):
        _arrange(lm, pair, settings)
    common = {
        "model": identity,
        "direction": str(direction),
        "dtype": str(lm.model.dtype),
        "device": lm.model.device.type,
        "closed": settings.closed,
        "windowed": settings.windowed,
    }
    progress = Progress("score", num_pairs, "pairs")
    num_known = num_tokens = 0
    with ScoreCache(settings.cache) as cache, open_output(output) as file:
        for block in _blocks(lm, _read_pairs(source, settings, direction), settings):
            keys = [score_key(common, pair.target, pair.given) for pair in block]
            known = cache.find(keys)
            missing = [i for i, key in enumerate(keys) if key not in known]
            layouts = [_arrange(lm, block[i], settings) for i in missing]
            scores = lm.score(layouts, batch_tokens=settings.batch_tokens)
            cache.add((keys[i], s.token_logprobs, s.num_windows) for i, s in zip(missing, scores, strict=True))
            known |= {keys[i]: _values(score) for i, score in zip(missing, scores, strict=True)}
            for pair, key in zip(block, keys, strict=True):
                file.write(json.dumps(_scored(pair, *known[key], direction, settings), ensure_ascii=False) + "\n")
                num_tokens += len(known[key][0])
            num_known += len(block) - len(missing)
            progress.update(len(block))
    progress.close()
    return ScoreCounts(num_pairs, num_known, num_tokens, direction)


def _assumed(settings: ScoreSettings) -> Direction | None:
    return Direction.REVERSE if settings.assume_reverse else None


def _choose_direction(record: FolderRecord, settings: ScoreSettings) -> Direction:
    """What the model says, or what was said of one that says nothing."""
    direction = record.direction or _assumed(settings) or Direction.FORWARD
    check_direction(record, Direction.REVERSE if settings.assume_reverse else direction, _assumed(settings))
    return direction


def _read_pairs(source: Path, settings: ScoreSettings, direction: Direction) -> Iterator[_Pair]:
    for number, record in read_records(source):
        where = f"{source}, line {number}"
        earlier = read_text_field(record, settings.earlier_key, where)
        later = read_text_field(record, settings.later_key, where)
        if settings.field in record:
            raise InputError(f"{where}: field {settings.field!r} is there already. Name another with --field")
        if direction is Direction.REVERSE:
            yield _Pair(record, where, earlier, settings.separator + later)
        else:
            yield _Pair(record, where, later, earlier + settings.separator)


def _arrange(lm: DirectedLM, pair: _Pair, settings: ScoreSettings) -> Any:
    return lm.arrange(pair.target, pair.given, closed=settings.closed, windowed=settings.windowed, what=pair.where)


def _blocks(lm: DirectedLM, pairs: Iterator[_Pair], settings: ScoreSettings) -> Iterator[list[_Pair]]:
    """Cut the pairs into blocks by the length of their texts, four characters taken for a token."""
    block: list[_Pair] = []
    left = budget = BATCHES_PER_BLOCK * settings.batch_tokens
    for pair in pairs:
        block.append(pair)
        left -= 1 + (len(pair.target) + len(pair.given)) // 4
        if left <= 0:
            yield block
            block, left = [], budget
    if block:
        yield block


def _values(score: Score) -> tuple[list[float], int]:
    return list(score.token_logprobs), score.num_windows


def _scored(
    pair: _Pair, values: list[float], num_windows: int, direction: Direction, settings: ScoreSettings
) -> dict[str, Any]:
    score: dict[str, Any] = {"logprob": sum(values), "num_tokens": len(values), "direction": str(direction)}
    if settings.windowed:
        score["num_windows"] = num_windows
    if settings.with_tokens:
        score["token_logprobs"] = values
    return {**pair.record, settings.field: score}
