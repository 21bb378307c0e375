"""In which order samples are read: an order that a longer run only continues.

Two orders exist. `megatron` is the library's: one shuffle over all epochs of a run, so the number of
steps decides it. `epochs` is this module's, and the default. Here are its arithmetic and its
generators, and the little that must be known of Megatron's order to say whether a change of length
would change it. The dataset classes that use them are in `data/megatron_dataset.py`.

The order `epochs` (T tokens an epoch, S = --seq-length, a = 1 for the extra token of a label):

    stream    documents of epoch 0, permuted | of epoch 1, permuted anew | of epoch 2 ...
    samples   |---0---|---1---|---2---|---3---|---4---|---5---|---6---|---7---|
    windows   samples that end in epoch 0  | that end in epoch 1        | in epoch 2
    read      a shuffle of window 0, then a shuffle of window 1, then of window 2

Sample k holds the positions kS ... (k+1)S of the stream, its last one included (a = 1).

Why a longer run only continues it. Let E be the number of epochs of a run.
1. The documents of epoch e are permuted by a generator of (seed, split, e). So the stream of E epochs
   is a prefix of the stream of E + 1, and sample k is the same tokens in both.
2. Sample k ends in epoch e when its last position lies there: eT <= (k+1)S + a - 1 < (e+1)T, which is
   (eT - a) // S <= k < ((e+1)T - a) // S. The bounds do not hold E, so neither does window e.
3. E epochs hold (ET - a) // S samples, which is the upper bound of window E - 1: the samples of a run
   are the union of its windows, whole, with nothing left over.
4. Window e is shuffled by a generator of (seed, split, e). So the order of E epochs is the concatenation
   of E shuffles, none of which knows E, and a prefix of the order of E + 1.

Every sample is read once; every token of an epoch is read once before the next epoch's are, but for the
one sample that spans two epochs, which counts to the later one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

EPOCHS, MEGATRON = "epochs", "megatron"
ORDERS = (EPOCHS, MEGATRON)
SCHEME_VERSION = 1
"""Raise it with any change of the arithmetic or the generators: it is recorded in checkpoints and caches."""
SPLITS = ("train", "valid", "test")
_DOCUMENTS, _SAMPLES = 0, 1
_LAST_EPOCH_APART_BELOW = 0.80  # Megatron's threshold, see `megatron_epochs`


def _generator(seed: int, split: str, epoch: int, purpose: int) -> np.random.RandomState:
    """The generator of one shuffle.

    `RandomState` and not `Generator`: numpy promises never to change what the former gives (NEP 19), and
    an order that survives must survive an update of numpy.
    """
    words = (SCHEME_VERSION, purpose, SPLITS.index(split), epoch, seed & 0xFFFFFFFF, seed >> 32)
    return np.random.RandomState(np.array(words, dtype=np.uint32))


def num_samples_in(num_epochs: int, tokens_per_epoch: int, seq_length: int, extra: int = 1) -> int:
    """Samples that `num_epochs` epochs hold; 0 where they are too short for one."""
    return max(0, (num_epochs * tokens_per_epoch - extra) // seq_length)


def num_epochs_for(num_samples: int, tokens_per_epoch: int, seq_length: int, extra: int = 1) -> int:
    """The least number of epochs, at least 1, that hold `num_samples` samples.

    >>> num_epochs_for(3, tokens_per_epoch=10, seq_length=4)
    2
    """
    assert tokens_per_epoch > 0, "an epoch without a token never holds a sample"
    return max(1, -(-(num_samples * seq_length + extra) // tokens_per_epoch))


def window_bounds(num_epochs: int, tokens_per_epoch: int, seq_length: int, extra: int = 1) -> np.ndarray:
    """Where the windows begin: window e is the samples bounds[e] ... bounds[e + 1] - 1; int64 [num_epochs + 1].

    >>> window_bounds(3, tokens_per_epoch=10, seq_length=4).tolist()
    [0, 2, 4, 7]
    """
    epochs = np.arange(num_epochs + 1, dtype=np.int64)
    return np.maximum(0, (epochs * tokens_per_epoch - extra) // seq_length)


def build_document_index(documents: np.ndarray, num_epochs: int, seed: int, split: str) -> np.ndarray:
    """Permute the documents of every epoch.

    Args:
        documents: numbers of the documents of the split; int32 [n].
        num_epochs: epochs to lay end to end.
        seed: `--seed`.
        split: one of `SPLITS`.

    Returns:
        int32 [num_epochs * n]; what stands in epoch e does not depend on `num_epochs`.
    """
    index = np.tile(documents.astype(np.int32, copy=False), num_epochs)
    for epoch, part in enumerate(index.reshape(num_epochs, len(documents))):
        _generator(seed, split, epoch, _DOCUMENTS).shuffle(part)
    return index


def build_shuffle_index(bounds: np.ndarray, seed: int, split: str) -> np.ndarray:
    """Shuffle the samples inside each window.

    Args:
        bounds: from `window_bounds`; int64 [E + 1].
        seed: `--seed`.
        split: one of `SPLITS`.

    Returns:
        The number of the sample that is read n-th; uint32 or, for more samples than it counts, int64 [bounds[E]].
    """
    num_samples = int(bounds[-1])
    index = np.arange(num_samples, dtype=np.uint32 if num_samples < 2**32 - 1 else np.int64)
    for epoch, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        if end - start > 1:
            _generator(seed, split, epoch, _SAMPLES).shuffle(index[start:end])
    return index


def epoch_of_sample(sample: int, tokens_per_epoch: int, seq_length: int, extra: int = 1) -> int:
    """The epoch in which a sample ends, i.e. the window that it belongs to.

    >>> [epoch_of_sample(k, tokens_per_epoch=10, seq_length=4) for k in range(7)]
    [0, 0, 1, 1, 2, 2, 2]
    """
    return ((sample + 1) * seq_length + extra - 1) // tokens_per_epoch


@dataclass(frozen=True)
class MegatronEpochs:
    """What decides Megatron's shuffle of one dataset: with another value, every position changes.

    Attributes:
        num_epochs: epochs that are laid end to end and shuffled together.
        is_last_apart: whether the last of them is shuffled by itself.
    """

    num_epochs: int
    is_last_apart: bool


def megatron_epochs(num_samples: int | None, tokens_per_epoch: int, seq_length: int) -> MegatronEpochs:
    """How Megatron shuffles a dataset that is asked for `num_samples` samples (None: one epoch).

    Source: `GPTDataset._build_document_sample_shuffle_indices`; a test compares them.
    """
    if num_samples is None:
        return MegatronEpochs(1, False)
    num_epochs = num_epochs_for(num_samples, tokens_per_epoch, seq_length)
    if num_epochs == 1:
        return MegatronEpochs(1, False)
    from_last = num_samples - ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    per_epoch = (tokens_per_epoch - 1) // seq_length
    return MegatronEpochs(num_epochs, from_last < int(_LAST_EPOCH_APART_BELOW * per_epoch))
