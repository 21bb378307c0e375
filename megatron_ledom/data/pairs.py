"""Questions and answers as documents: how a pair becomes ids, and how pairs are laid into training samples.

A pair is one document. Its two parts are tokenised separately, as the scoring of log P(question | answer)
tokenises them, so that a scorer learns exactly the ids that it will be asked about. The separator belongs to the part
that the model reads first, because it is conditioned on and never scored:

    reverse file    question                 separator + answer
    forward file    question + separator     answer

`PREFIX.pairs` holds a little-endian uint32 a document: the ids of the question's part, of which the loss needs
to know. Which part that is in, the manifest says (`PairRecord`), and `direction.pair_target` counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_ledom.data.backends import Encoder
from megatron_ledom.data.manifest import PairRecord
from megatron_ledom.data.records import Batch
from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError

SIDECAR = "pairs"


def encode_pairs(
    batch: Batch, pairs: PairRecord, direction: Direction, encoder: Encoder, max_tokens: int | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokenise the pairs of a batch; those that are none are moved to its bad rows.

    Args:
        batch: texts of the two keys, question first; changed.
        pairs: what the dataset is.
        direction: of the dataset.
        encoder: what makes ids.
        max_tokens: most ids of a training sample with one boundary, or None for any number.

    Returns:
        The ids of each pair in natural order, and the ids in each question's part; int64 [pairs].
    """
    why: dict[int, str] = {}
    for place, texts in enumerate(zip(*batch.texts, strict=True)):
        for key, text in zip((pairs.question_key, pairs.answer_key), texts, strict=True):
            if not text.decode("utf-8").strip():
                why[place] = f"the value of {key!r} is empty: a pair needs both"
    _drop(batch, why)
    questions, answers = batch.texts
    after_question, before_answer = (text.encode() for text in separator_places(pairs.separator, direction))
    first = encoder.encode_batch([question + after_question for question in questions])
    second = encoder.encode_batch([before_answer + answer for answer in answers])
    why = {}
    for place, (question_ids, answer_ids) in enumerate(zip(first, second, strict=True)):
        num_ids = 1 + len(question_ids) + len(answer_ids)
        if not len(question_ids) or not len(answer_ids):
            why[place] = "the question or the answer has no token: a pair needs both"
        elif max_tokens is not None and num_ids > max_tokens:
            why[place] = f"{num_ids:,} ids with the boundary, more than --max-tokens {max_tokens:,}; nothing is cut"
    _drop(batch, why)
    kept = [place for place in range(len(first)) if place not in why]
    lengths = np.array([len(first[place]) for place in kept], dtype=np.int64)
    return [np.concatenate([first[place], second[place]]) for place in kept], lengths


def separator_places(separator: str, direction: Direction) -> tuple[str, str]:
    """What is tokenised at the end of a question, and at the beginning of an answer.

    >>> separator_places("|", Direction.REVERSE)
    ('', '|')
    """
    return ("", separator) if direction is Direction.REVERSE else (separator, "")


def _drop(batch: Batch, why: Mapping[int, str]) -> None:
    """Move the records at these places of a batch to its bad rows."""
    if why:
        batch.bad = sorted([*batch.bad, *((batch.rows[place], reason) for place, reason in why.items())])
        batch.rows = [row for place, row in enumerate(batch.rows) if place not in why]
        batch.texts = [[text for place, text in enumerate(column) if place not in why] for column in batch.texts]


def load_question_lengths(prefix: str | Path) -> np.ndarray:
    """Map the ids in each question's part; uint32 [documents].

    Raises:
        InputError: the file is missing or empty.
    """
    path = Path(f"{prefix}.{SIDECAR}")
    if not path.is_file() or not path.stat().st_size:
        raise InputError(f"{path} is missing or empty: copy all files of the dataset, or make it anew")
    return np.memmap(path, dtype="<u4", mode="r")


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Put documents into as few samples as a simple rule finds: the longest first, each where least room is left over.

    Args:
        lengths: ids of each document, at most `capacity`; int [n].
        capacity: ids in a sample.

    Returns:
        The documents of each sample; every document once. The same arguments give the same result.

    >>> [sample.tolist() for sample in pack(np.array([3, 9, 6, 2]), 10)]
    [[1], [2, 0], [3]]
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left over -> samples with so much room
    has_room = 0  # bit r: some sample has room for r
    samples: list[list[int]] = []
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        if fitting := has_room >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            sample = by_room[room].pop()
            has_room ^= (not by_room[room]) << room
        else:
            sample, room = len(samples), capacity
            samples.append([])
        samples[sample].append(document)
        by_room[room - length].append(sample)
        has_room |= 1 << (room - length)
    return [np.array(sample) for sample in samples]


def one_each(num_documents: int) -> Sequence[np.ndarray]:
    """One document a sample, as `pack` would say it."""
    return list(np.arange(num_documents)[:, None])
