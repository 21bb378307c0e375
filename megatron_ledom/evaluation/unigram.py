"""The yardstick that every trained model must beat: token frequencies of its own training data.

A unigram model ignores context, and therefore order: one number serves both
directions. It counts ids in a dataset's `.bin` file; it needs neither Megatron nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ledom.data.manifest import load_manifest
from megatron_ledom.errors import InputError

IDS_PER_READ = 1 << 22  # numpy.bincount widens to int64: 32 MiB at a time


@dataclass(frozen=True)
class UnigramModel:
    """Token frequencies with add-one smoothing: P(t) = (count of t + 1) / (tokens + vocabulary).

    Attributes:
        counts: int64 [vocab_size].
        tokenizer_fingerprint: of the tokenizer that made the ids.
        append_eod: whether the documents were closed with the end-of-document id, so that it was counted.
        prefix: the dataset that was counted.
    """

    counts: np.ndarray
    tokenizer_fingerprint: str
    append_eod: bool
    prefix: str

    def total_nll(self, documents: Iterable[Sequence[int]]) -> float:
        """Negative log-likelihood of all ids of the documents together, in nats.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
        if ids.size and (ids.min() < 0 or ids.max() >= self.counts.size):
            raise InputError(
                f"token id {ids.max()} is outside the {self.counts.size} ids of {self.prefix}'s tokenizer. "
                "Use the dataset that the models were trained on"
            )
        smoothed = self.counts + 1.0
        return float(-np.log(smoothed / smoothed.sum())[ids].sum())


def count_tokens(prefix: str | Path) -> UnigramModel:
    """Count the ids of the dataset `PREFIX.bin`.

    Args:
        prefix: as in Megatron's --data-path, e.g. corpus_text_document.

    Raises:
        InputError: the dataset or its manifest is missing or damaged, or the file disagrees with the manifest.
    """
    manifest = load_manifest(prefix)
    path = Path(f"{prefix}.bin")
    dtype = np.dtype(manifest.dtype)
    expected_bytes = manifest.counts.tokens * dtype.itemsize
    found_bytes = path.stat().st_size if path.is_file() else 0
    if found_bytes != expected_bytes or expected_bytes == 0:
        raise InputError(
            f"{path} has {found_bytes} bytes, its manifest says {expected_bytes} "
            f"({manifest.counts.tokens} tokens of {dtype}). Make the dataset anew with tools/preprocess_data.py"
        )
    ids = np.memmap(path, dtype=dtype, mode="r")
    vocab_size = manifest.tokenizer.vocab_size
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, ids.size, IDS_PER_READ):
        part = np.bincount(ids[start : start + IDS_PER_READ], minlength=vocab_size)
        if part.size > vocab_size:
            raise InputError(f"{path} holds id {part.size - 1}, its tokenizer has {vocab_size} ids. Make it anew")
        counts += part
    return UnigramModel(counts, manifest.tokenizer.fingerprint, manifest.append_eod, str(prefix))
