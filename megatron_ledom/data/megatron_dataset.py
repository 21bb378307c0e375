"""Megatron's GPT dataset in an order that survives, over documents that can be read in the other direction.

The classes derive from Megatron's, so this module imports it at its top; import it only where Megatron
is there already. What the order is and why it survives is written in `data/order.py`. Which files are
to be turned is decided by `data/dataset.py` and travels in the configuration.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split

from megatron_ledom.data import order
from megatron_ledom.direction import flip, turn_sample, turn_spans
from megatron_ledom.errors import InputError
from megatron_ledom.log import get_logger

INDICES = ("document_index", "sample_index", "shuffle_index")


@dataclass
class DatasetConfig(GPTDatasetConfig):
    """Megatron's configuration, and what ours adds.

    Samples are made in the model's order, as the files hold them or read them backwards; `turned_samples` puts each
    into natural order afterwards, so that a run reads the same samples either way.

    Attributes:
        data_order: one of `order.ORDERS`.
        turned: prefix -> whether its documents are closed by an end-of-document id, for the files that
            are read in the other direction.
        identities: prefix -> what its bytes are (a hash, or sizes): indices that are cached for other
            bytes under the same name are not used.
        turned_samples: samples come in natural order, for a reverse model.
        document_bounds: `attention_mask` holds the first and last token of every token's document, int32 [2, S].
    """

    data_order: str = order.EPOCHS
    turned: dict[str, bool] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)
    order_version: int = order.SCHEME_VERSION
    turned_samples: bool = False
    document_bounds: bool = False


def arrange_sample(sample: dict[str, Any], config: DatasetConfig) -> dict[str, Any]:
    """Add the bounds of documents to a sample in the model's order, and put it into natural order, where asked for."""
    bounds = document_bounds(sample["tokens"].numpy() == config.tokenizer.eod) if config.document_bounds else None
    if config.turned_samples:
        assert "attention_mask" not in sample, "a dense mask is not turned: documents come as bounds"
        sample = turn_sample(sample)
        bounds = None if bounds is None else turn_spans(*bounds)
    if bounds is not None:
        sample["attention_mask"] = torch.from_numpy(np.stack(bounds).astype(np.int32))
    return sample


def document_bounds(is_end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last index of every token's document; a document ends where `is_end`, or with the sample.

    >>> document_bounds(np.array([False, False, True, False]))
    (array([0, 0, 0, 3]), array([2, 2, 2, 3]))
    """
    ends = [*np.flatnonzero(is_end[:-1]).tolist(), len(is_end) - 1]
    sizes = np.diff([-1, *ends])
    last = np.repeat(ends, sizes)
    return last - np.repeat(sizes, sizes) + 1, last


class TurnedDataset:
    """An indexed dataset whose documents are read as the file of the other direction holds them.

        stored     t0 t1 t2 t3 E        position  0  1  2  3  4
        turned     t3 t2 t1 t0 E        reads     3  2  1  0  4

    A part of a document is read as that part alone: nothing else of it is touched.

    Args:
        stored: Megatron's `IndexedDataset`, one sequence a document.
        is_closed: whether the last id of each document is the end-of-document id, which stays last.
    """

    def __init__(self, stored: Any, *, is_closed: bool) -> None:
        self.stored, self.is_closed = stored, is_closed

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Ids in each document; int32 [documents]."""
        lengths: np.ndarray = self.stored.sequence_lengths
        return lengths

    @property
    def path_prefix(self) -> str:
        """The prefix of the files."""
        return str(self.stored.path_prefix)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return `length` ids of document `idx` from `offset` on, both counted as it is read here."""
        num_ids, start = int(self.sequence_lengths[idx]), int(offset)
        end = num_ids if length is None else start + int(length)
        num_turned = max(0, num_ids - self.is_closed)  # the ids before E, which change places
        first, last = min(start, num_turned), min(end, num_turned)
        ids = flip(self.stored.get(idx, offset=num_turned - last, length=last - first))
        if end - max(start, num_turned) < 1:
            return ids
        return np.concatenate([ids, self.stored.get(idx, offset=num_turned, length=1)])


class MockDataset(MockGPTDataset):
    """Megatron's mock data, in the order that is asked for."""

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        return arrange_sample(super().__getitem__(idx), self.config)


class MegatronOrderDataset(GPTDataset):
    """Megatron's dataset in Megatron's order, over documents that may be turned."""

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        return arrange_sample(super().__getitem__(idx), self.config)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: DatasetConfig) -> Any:
        """Open the files, turned where the configuration says so."""
        stored = GPTDataset.build_low_level_dataset(dataset_path, config)
        is_closed = config.turned.get(dataset_path)
        return stored if is_closed is None else TurnedDataset(stored, is_closed=is_closed)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "order_version", "identities"]

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        """The epochs to lay end to end; a split without a token is refused: Megatron would count for ever."""
        self._check_not_empty(num_tokens_per_epoch)
        return int(super()._get_num_epochs(num_tokens_per_epoch))

    def _check_not_empty(self, num_tokens: int) -> None:
        if num_tokens == 0:
            raise InputError(
                f"the {self.index_split.name} split of {self.dataset_path} holds no token ({len(self.indices)} "
                f"documents), and {self.num_samples} samples are asked for. Give the split a larger share (--split)"
            )


class EpochOrderDataset(MegatronOrderDataset):
    """Epochs laid end to end, each permuted by itself; see `data/order.py`.

    The cache is Megatron's: rank 0 builds and writes, the builder's barrier holds the others, which map the
    files; `fast_cache_load` and `defer_npy_index_mmap` find them without looking.
    """

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        """The epochs to lay end to end; `__len__` asks for it too, with `defer_npy_index_mmap`.

        A blend may draw K + 1 samples more from one of its K datasets than its share: the greedy choice exceeds
        a share by at most 1, and the length of the blend is the sum of K rounded-up shares. Megatron leaves a
        margin of 0.5 %, which is too little where shares are small. Here a longer dataset has the same
        beginning, so the margin costs nothing.
        """
        if self.num_samples is None:
            return 1
        blends = [b for b in (self.config.blend, *(self.config.blend_per_split or ())) if b is not None]
        num_sources = max((len(prefixes) for prefixes, _ in blends), default=1)
        wanted = self.num_samples + (num_sources + 1 if num_sources > 1 else 0)
        return order.num_epochs_for(wanted, num_tokens_per_epoch, self.config.sequence_length, self._extra)

    @property
    def _extra(self) -> int:
        return int(self.config.add_extra_token_to_sequence)

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        """Load the three indices from the cache, or build them; None each where they are opened at first use."""
        folder = self.config.path_to_cache or Path(self.dataset.path_prefix, "cache", f"{type(self).__name__}_indices")
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        paths = {name: Path(folder, f"{base}-{name}.npy") for name in INDICES}
        if self.config.defer_npy_index_mmap:
            self.path_to_document_index, self.path_to_sample_index, self.path_to_shuffle_index = map(
                str, paths.values()
            )
            return None, None, None
        description = Path(folder, f"{base}-description.txt")  # written last: where it is, all is
        is_builder = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not self.config.fast_cache_load and is_builder and not description.is_file():
            arrays = dict(zip(INDICES, self._build_indices(), strict=True))
            _write_cache(paths, arrays, description, self.unique_description)
            return arrays["document_index"], arrays["sample_index"], arrays["shuffle_index"]
        try:
            documents, samples, shuffle = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths.values())
        except FileNotFoundError as error:
            raise InputError(
                f"the indices of {self.dataset_path} are not in {folder} ({error.filename}): --data-cache-path must be "
                "a folder that all nodes share, and --dataloader-fast-cache-load needs a run without it before"
            ) from error
        return documents, samples, shuffle

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        split, seq_length = self.index_split.name, self.config.sequence_length
        assert self.index_split is not Split.valid or self.config.drop_last_partial_validation_sequence
        lengths = self.dataset.sequence_lengths
        num_tokens = int(lengths[self.indices].sum(dtype=np.int64))
        if num_tokens == 0:
            if self.num_samples:
                self._check_not_empty(num_tokens)
            return np.zeros(0, np.int32), np.zeros((1, 2), np.int32), np.zeros(0, np.uint32)
        num_epochs = self._get_num_epochs(num_tokens)
        indices = build_indices(
            np.array(lengths),
            self.indices,
            num_epochs,
            *(seq_length, self.config.random_seed, split),
            extra=self._extra,
        )
        get_logger(__name__).info(
            "%s, %s split: %d epochs of %s tokens, %s samples",
            *(self.dataset_path, split, num_epochs, f"{num_tokens:,}", f"{len(indices[2]):,}"),
        )
        return indices


def build_indices(
    lengths: np.ndarray,
    documents: np.ndarray,
    num_epochs: int,
    seq_length: int,
    seed: int,
    split: str,
    *,
    extra: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Build the indices of the order `epochs`.

    Args:
        lengths: ids in each document of the file; int32.
        documents: numbers of the documents of the split; int32 [n].
        num_epochs: epochs to lay end to end.
        seq_length: `--seq-length`.
        seed: `--seed`.
        split: one of `order.SPLITS`.
        extra: ids in a sample beyond `seq_length`.

    Returns:
        Megatron's document index [num_epochs * n], sample index [samples + 1, 2] and shuffle index [samples].
    """
    from megatron.core.datasets import helpers

    num_tokens = int(lengths[documents].sum(dtype=np.int64))
    stream = order.build_document_index(documents, num_epochs, seed, split)
    samples = helpers.build_sample_idx(lengths, stream, seq_length, num_epochs, num_tokens, True, extra)
    bounds = order.window_bounds(num_epochs, num_tokens, seq_length, extra)
    assert len(samples) - 1 == bounds[-1], (len(samples), bounds[-1])
    return stream, samples, order.build_shuffle_index(bounds, seed, split)


def _write_cache(paths: dict[str, Path], arrays: dict[str, np.ndarray], description: Path, text: str) -> None:
    """Write the indices, each under another name first, and the description last."""
    description.parent.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, arrays[name], allow_pickle=False)
        temporary.replace(path)
    temporary = description.with_name(f".{description.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(description)


def build_datasets(config: DatasetConfig, num_samples: Sequence[int | None]) -> tuple[Any, Any, Any]:
    """Build the train, valid and test datasets; every rank calls it.

    Args:
        config: without a blend, Megatron's mock data is built.
        num_samples: wanted of each; None for one epoch.
    """
    classes = {order.EPOCHS: EpochOrderDataset, order.MEGATRON: MegatronOrderDataset}
    kind = MockDataset if config.mock else classes[config.data_order]
    train, valid, test = BlendedMegatronDatasetBuilder(kind, list(num_samples), lambda: True, config).build()
    return train, valid, test
