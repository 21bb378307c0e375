"""Megatron's dataset over questions and answers: whole pairs to a sample, the loss on the wanted part alone.

Like `data/megatron_dataset.py` it derives from Megatron's classes; import it only where Megatron is there
already. A sample begins with E, as a model reads when it scores, and ends with padding that is never learnt.
Reverse pairs `q q a` and `q a`, the loss on the question, `--seq-length 9` and `--pack-pairs`:

    stored      a q q E   a q E
    tokens      E a q q E a q 0 0       each pair with the E that stands before it
    labels      a q q E a q E 0 0
    loss        . ^ ^ ^ . ^ ^ . .
    positions   0 1 2 3 0 1 2 0 1       and a token sees its own pair alone

Without `--pack-pairs` a sample is one pair, nothing has to be hidden and no mask is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_ledom.data import order
from megatron_ledom.data.megatron_dataset import MegatronOrderDataset, arrange_sample
from megatron_ledom.data.pairs import load_question_lengths, one_each, pack
from megatron_ledom.direction import pair_target
from megatron_ledom.errors import InputError
from megatron_ledom.log import get_logger


class PairDataset(MegatronOrderDataset):
    """Samples of whole pairs, shuffled anew in every epoch; a longer run only continues a shorter one's order.

    Which pairs share a sample does not depend on the length of the run, and, as they do not see each other, it
    only decides which of them are learnt from at the same step.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        """Lay the pairs into samples: the documents, where each sample begins among them, and the samples' order."""
        split = self.index_split.name
        lengths = np.asarray(self.dataset.sequence_lengths)[self.indices].astype(np.int64)
        capacity, longest = self.config.sequence_length, int(lengths.max(initial=0))
        if longest > capacity:
            raise InputError(
                f"{int((lengths > capacity).sum()):,} of {len(lengths):,} pairs of {self.dataset_path} are longer than "
                f"--seq-length {capacity}, the longest has {longest:,} ids with its boundary: nothing is cut. Raise "
                "--seq-length, or leave them out: tools/preprocess_pairs.py --max-tokens --on-bad-record skip"
            )
        if len(lengths) == 0:
            if self.num_samples:
                self._check_not_empty(0)
            return np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64)
        self._question_lengths = load_question_lengths(self.dataset_path)
        samples = pack(lengths, capacity) if self.config.pack_pairs else one_each(len(lengths))
        documents = np.asarray(self.indices)[np.concatenate(samples)]
        begins = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])])
        num_epochs = -(-self._num_wanted // len(samples)) if self.num_samples is not None else 1
        shuffled = order.build_shuffle_index(np.arange(num_epochs + 1) * len(samples), self.config.random_seed, split)
        get_logger(__name__).info(
            "%s, %s split: %s pairs in %s samples, %.0f %% of it padding, %d epochs",
            *(self.dataset_path, split, f"{len(lengths):,}", f"{len(samples):,}"),
            *(100 * (1 - int(lengths.sum()) / (len(samples) * capacity)), num_epochs),
        )
        return documents, begins, shuffled % len(samples)

    @property
    def _num_wanted(self) -> int:
        """Samples to have an order for: a blend may draw a few more from a source than its share."""
        blends = [b for b in (self.config.blend, *(self.config.blend_per_split or ())) if b is not None]
        num_sources = max((len(prefixes) for prefixes, _ in blends), default=1)
        return int(self.num_samples) + (num_sources + 1 if num_sources > 1 else 0)

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def documents_of(self, sample: int) -> list[int]:
        """The documents of a sample, in the order in which they stand in it."""
        first, end = self.sample_index[sample : sample + 2].tolist()
        return [int(document) for document in self.document_index[first:end]]

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return sample number `idx` of the run; None gives one that counts nothing, to fill a batch."""
        pairs = self.config.pairs[self.dataset_path]
        documents = self.documents_of(int(self.shuffle_index[0 if idx is None else idx]))
        ids = [self.dataset.get(document) for document in documents]
        targets = []
        for document, stored in zip(documents, ids, strict=True):
            num_question = int(self._question_lengths[document])
            num_answer = len(stored) - num_question - 1
            targets.append(pair_target(num_question, num_answer, self.config.pair_direction, pairs.loss_on))
        sample = lay_out(ids, targets, self.config.sequence_length)
        if idx is None:
            sample["loss_mask"].zero_()
        bounds = None
        if self.config.pack_pairs:
            bounds = pair_bounds([len(pair) for pair in ids], self.config.sequence_length)
            if not self.config.document_bounds:
                sample["attention_mask"] = torch.from_numpy(dense_mask(bounds[0]))[None]
                bounds = None
        return arrange_sample(sample, self.config, bounds)


def lay_out(ids: Sequence[np.ndarray], targets: Sequence[tuple[int, int]], seq_length: int) -> dict[str, torch.Tensor]:
    """Lay stored pairs into one sample.

    Args:
        ids: of each pair as it is stored, E last.
        targets: of each, the first id to learn and one beyond the last.
        seq_length: tokens in the sample; not fewer than all ids together.

    Returns:
        tokens, labels, position_ids int64 [S]; loss_mask float32 [S].
    """
    tokens, labels, positions = (torch.zeros(seq_length, dtype=torch.int64) for _ in range(3))
    loss_mask = torch.zeros(seq_length)
    start = 0
    for pair, (first, beyond) in zip(ids, targets, strict=True):
        end = start + len(pair)
        labels[start:end] = torch.from_numpy(pair.astype(np.int64))
        tokens[start] = labels[end - 1]  # E, which precedes every document
        tokens[start + 1 : end] = labels[start : end - 1]
        positions[start:end] = torch.arange(len(pair))
        loss_mask[start + first : start + beyond] = 1.0
        start = end
    positions[start:] = torch.arange(seq_length - start)
    return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions}


def pair_bounds(lengths: Sequence[int], seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last index of every token's pair; what is left over counts as one more.

    >>> pair_bounds([2, 1], 5)
    (array([0, 0, 2, 3, 3]), array([1, 1, 2, 4, 4]))
    """
    ends = np.cumsum([*lengths, seq_length - sum(lengths)])
    sizes = np.diff(ends, prepend=0)
    return np.repeat(ends - sizes, sizes), np.repeat(ends - 1, sizes)


def dense_mask(first: np.ndarray) -> np.ndarray:
    """The same for Megatron's own attention: bool [S, S], True where a token must not look."""
    return np.triu(np.ones((len(first), len(first)), dtype=bool), k=1) | (first[:, None] != first[None, :])
