"""The order `epochs`: a longer run only continues a shorter one's, whatever the data and the length."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import normalize
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_ledom.data import order
from megatron_ledom.data.megatron_dataset import DatasetConfig, EpochOrderDataset, build_datasets, build_indices
from megatron_ledom.errors import InputError


class EveryToken:
    """A dataset in memory whose ids say where they come from: id n is the n-th token of the file."""

    path_prefix = "memory"

    def __init__(self, lengths: list[int]) -> None:
        self.sequence_lengths = np.array(lengths, dtype=np.int32)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        start = self.starts[idx] + offset
        return np.arange(start, self.starts[idx + 1] if length is None else start + length)

    @staticmethod
    def tokens_of(prefix: str) -> int:
        return Path(f"{prefix}.bin").stat().st_size // 4


TOKENIZER = SimpleNamespace(eod=0, pad=-1, vocab_size=1000, unique_identifiers={"class": "test"})
FLAGS: dict[str, Any] = {
    "tokenizer": TOKENIZER,
    "reset_position_ids": False,
    "reset_attention_mask": False,
    "eod_mask_loss": False,
    "create_attention_mask": False,
}


def samples_in_order(lengths: list[int], num_epochs: int, seq_length: int, seed: int, split: str) -> list[list[int]]:
    """The slow twin of the dataset: every sample as the tokens of the file, in the order in which they are read."""
    source = EveryToken(lengths)
    documents, samples, shuffle = build_indices(
        source.sequence_lengths, np.arange(len(lengths), dtype=np.int32), num_epochs, seq_length, seed, split
    )
    stream = np.concatenate([source.get(document) for document in documents])
    for k, (document, offset) in enumerate(samples.tolist()):  # Megatron's C++ found the same places
        if offset < lengths[documents[document]]:
            assert source.get(documents[document], offset)[0] == stream[k * seq_length]
    return [stream[k * seq_length : (k + 1) * seq_length + 1].tolist() for k in shuffle.tolist()]


DOCUMENTS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    lengths=DOCUMENTS,
    seq_length=st.integers(1, 40),
    epochs=st.tuples(st.integers(1, 6), st.integers(0, 5)),
    seed=st.integers(0, 2**40),
    split=st.sampled_from(order.SPLITS),
)
def test_a_longer_run_continues_a_shorter_one(
    lengths: list[int], seq_length: int, epochs: tuple[int, int], seed: int, split: str
) -> None:
    shorter = samples_in_order(lengths, epochs[0], seq_length, seed, split)
    longer = samples_in_order(lengths, sum(epochs), seq_length, seed, split)
    assert longer[: len(shorter)] == shorter
    assert all(len(sample) == seq_length + 1 for sample in longer)


@settings(max_examples=150, deadline=None)
@given(lengths=DOCUMENTS, seq_length=st.integers(1, 40), budgets=st.tuples(*[st.floats(0.1, 5.0)] * 2))
def test_budgets_in_epochs_agree_on_what_both_read(
    lengths: list[int], seq_length: int, budgets: tuple[float, float]
) -> None:
    """As Megatron asks for it: a number of samples, from 0.1 to 5 epochs."""
    tokens = sum(lengths)
    read = []
    for budget in sorted(budgets):
        num_samples = int(budget * tokens) // seq_length
        num_epochs = order.num_epochs_for(num_samples, tokens, seq_length)
        assert order.num_samples_in(num_epochs, tokens, seq_length) >= num_samples
        assert num_epochs == 1 or order.num_samples_in(num_epochs - 1, tokens, seq_length) < num_samples
        read.append(samples_in_order(lengths, num_epochs, seq_length, 1234, "train")[:num_samples])
    assert read[1][: len(read[0])] == read[0]


@settings(max_examples=100, deadline=None)
@given(lengths=DOCUMENTS, seq_length=st.integers(1, 20), num_epochs=st.integers(1, 5))
def test_an_epoch_is_read_whole_before_the_next_begins(lengths: list[int], seq_length: int, num_epochs: int) -> None:
    tokens = sum(lengths)
    bounds = order.window_bounds(num_epochs, tokens, seq_length)
    _, _, shuffle = build_indices(
        np.array(lengths, dtype=np.int32),
        np.arange(len(lengths), dtype=np.int32),
        *(num_epochs, seq_length, 7, "train"),
    )
    assert sorted(shuffle.tolist()) == list(range(order.num_samples_in(num_epochs, tokens, seq_length)))
    for epoch in range(num_epochs):
        window = shuffle[bounds[epoch] : bounds[epoch + 1]].tolist()
        assert sorted(window) == list(range(bounds[epoch], bounds[epoch + 1]))
        assert all(order.epoch_of_sample(sample, tokens, seq_length) == epoch for sample in window)
        last_positions = [(sample + 1) * seq_length for sample in window]
        assert all(epoch * tokens <= position < (epoch + 1) * tokens for position in last_positions)


def test_epochs_splits_and_seeds_differ_and_the_order_is_pinned() -> None:
    """The numbers are what checkpoints rely on: they change only with SCHEME_VERSION."""
    documents = np.arange(8, dtype=np.int32)
    first = order.build_document_index(documents, 2, 1234, "train").reshape(2, 8).tolist()
    assert first == [[0, 6, 2, 7, 4, 3, 5, 1], [5, 6, 7, 1, 0, 2, 3, 4]]
    assert order.build_shuffle_index(np.array([0, 5, 5, 9]), 1234, "train").tolist() == [2, 0, 1, 4, 3, 6, 8, 7, 5]
    others = [order.build_document_index(documents, 1, *key).tolist() for key in ((1, "train"), (1234, "valid"))]
    others.append(order.build_document_index(documents, 1, 1234 + 2**32, "train").tolist())
    assert first[0] not in others and len({tuple(o) for o in others}) == 3


def write_dataset(prefix: Path, lengths: list[int]) -> str:
    """A file whose n-th id is n."""
    builder, start = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32), 0
    for length in lengths:
        builder.add_document(torch.arange(start, start + length), [length])
        start += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("order")
    rng = np.random.RandomState(0)
    return [
        write_dataset(folder / name, rng.randint(1, 40, size=count).tolist())
        for name, count in (("many", 60), ("some", 25), ("few", 9))
    ]


def build(blend: Any, num_samples: int, cache: Path, **fields: Any) -> Any:
    settings = {"random_seed": 1234, "sequence_length": 16, "split": "80,20,0", **FLAGS, **fields}
    config = DatasetConfig(blend=blend, path_to_cache=str(cache), **settings)
    return build_datasets(config, (num_samples, 2, 0))


def texts(dataset: Any, count: int) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(count)]


WEIGHTS = ([1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1e6, 1.0, 3.0], [1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_longer_blend_continues_a_shorter_one(files: list[str], weights: list[float], tmp_path: Path) -> None:
    """Megatron chooses the source of sample n from the weights and what came before: the length does not enter."""
    blend = (files[: len(weights)], weights)
    whole, _, _ = build(blend, 400, tmp_path)  # 9 epochs of `few` where it has a third
    expected = texts(whole, 400)
    assert len({tuple(t) for t in expected}) > 40
    for num_samples in (1, 2, 7, 50, 111, 399):
        train, valid, _ = build(blend, num_samples, tmp_path)
        assert texts(train, num_samples) == expected[:num_samples]
        assert not {i for t in texts(valid, 2) for i in t} & {i for t in expected for i in t} or len(weights) > 1


LAYOUTS = st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])  # data-parallel ranks, micro-batch size
BATCH = 4


def read(dataset: Any, num_samples: int, consumed: int, layout: tuple[int, int]) -> list[list[list[int]]]:
    """What a run over `num_samples` samples reads from `consumed` on: its global batches, rank by rank."""
    ranks, size = layout
    readers = [
        iter(MegatronPretrainingSampler(num_samples, consumed, size, rank, ranks))
        for rank in range(ranks)
        if consumed < num_samples
    ]
    batches = []
    for _ in range(consumed, num_samples, BATCH):
        numbers = [n for _ in range(BATCH // (ranks * size)) for reader in readers for n in next(reader)]
        batches.append([dataset[n]["tokens"].tolist() for n in numbers])
    return batches


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=3),
    has_weights=st.booleans(),
    steps=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60)),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seq_length=st.sampled_from([8, 16, 100]),
)
def test_any_run_resumed_at_any_layout_and_length_reads_on(
    files: list[str],
    tmp_path: Path,
    weights: list[float],
    has_weights: bool,
    steps: tuple[int, int, int],
    layouts: tuple[tuple[int, int], ...],
    seq_length: int,
) -> None:
    """A run of one length stopped at any step, and resumed with another, against one that was never stopped."""
    prefixes = files[: len(weights)]
    tokens = [float(EveryToken.tokens_of(prefix)) for prefix in prefixes]
    blend = (prefixes, weights if has_weights else tokens if len(prefixes) > 1 else None)
    first, second = steps[0], max(steps[1], min(steps[0], steps[2]))
    stop = min(steps[2], first, second)
    shorter, longer = (build(blend, n * BATCH, tmp_path, sequence_length=seq_length)[0] for n in (first, second))
    before = read(shorter, first * BATCH, 0, layouts[0])[:stop]
    after = read(longer, second * BATCH, stop * BATCH, layouts[1])
    assert before + after == read(longer, second * BATCH, 0, layouts[2])


def test_megatrons_own_order_does_change(files: list[str], tmp_path: Path) -> None:
    """What the issue says of it, and that its epochs and its threshold are foreseen."""
    blend = (files[:1], None)
    train, _, _ = build(blend, 10, tmp_path, data_order=order.MEGATRON)
    tokens, seq_length = train._get_num_tokens_per_epoch(), 16
    per_epoch = (tokens - 1) // seq_length
    by_epochs: dict[order.MegatronEpochs, set[Any]] = {}
    for share in (0.3, 0.9, 1.0, 1.05, 1.3, 1.75, 1.79, 1.85, 2.0, 2.4, 2.95):
        num_samples = int(share * per_epoch)
        train, _, _ = build(blend, num_samples, tmp_path, data_order=order.MEGATRON)
        foreseen = order.megatron_epochs(num_samples, tokens, seq_length)
        assert foreseen.num_epochs == train._get_num_epochs(tokens)
        by_epochs.setdefault(foreseen, set()).add(tuple(map(tuple, texts(train, 20))))
    assert len(by_epochs) >= 5, by_epochs
    assert all(len(orders) == 1 for orders in by_epochs.values()), "alike where foreseen alike"
    orders = [next(iter(orders)) for orders in by_epochs.values()]
    assert len(set(orders)) == len(orders), "different where foreseen different"
    ours = [texts(build(blend, n, tmp_path)[0], 20) for n in (int(0.9 * per_epoch), int(1.05 * per_epoch))]
    assert ours[0] == ours[1]


def test_a_share_that_rounds_up_never_runs_out_of_samples(files: list[str], tmp_path: Path) -> None:
    """Megatron's margin of 0.5 % is too little for small shares; ours is what the greedy choice can exceed."""
    for weights in ([0.999, 0.0006, 0.0004], [0.34, 0.33, 0.33]):
        for num_samples in range(1, 60):
            shares = _get_size_per_split_per_dataset(normalize(weights), [num_samples, 2, 0])
            train, _, _ = build((files, weights), num_samples, tmp_path, mid_level_dataset_surplus=0.0)
            assert isinstance(train, BlendedDataset)
            drawn = np.bincount(train.dataset_index, minlength=3)
            assert all(drawn[i] <= shares[i][0] + 4 for i in range(3))


def test_the_cache_is_used_and_says_what_decides_the_order(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _, _ = build((files[:1], None), 30, tmp_path)
    expected, written = texts(train, 30), set(tmp_path.iterdir())
    assert all("EpochOrderDataset" in path.name for path in written)
    monkeypatch.setattr(EpochOrderDataset, "_build_indices", None)  # a second building would fail
    again, _, _ = build((files[:1], None), 30, tmp_path)
    assert texts(again, 30) == expected and set(tmp_path.iterdir()) == written
    lazy, _, _ = build((files[:1], None), 30, tmp_path, defer_npy_index_mmap=True)
    assert lazy.shuffle_index is None and len(lazy) == len(again) and texts(lazy, 30) == expected
    for change in ({"random_seed": 1}, {"sequence_length": 8}, {"identities": {files[0]: "other bytes"}}):
        with pytest.raises(TypeError, match="NoneType"):
            build((files[:1], None), 30, tmp_path, **change)


def test_the_fast_cache_is_loaded_without_a_look_and_its_absence_is_named(files: list[str], tmp_path: Path) -> None:
    per_split = [(files[:1], None), (files[1:2], None), (files[2:], None)]
    fields = {"split": None, "blend_per_split": per_split}
    expected = texts(build(None, 30, tmp_path, **fields)[0], 30)
    fast, _, _ = build(None, 30, tmp_path, **fields, fast_cache_load=True)
    assert texts(fast, 30) == expected
    with pytest.raises(InputError, match="--dataloader-fast-cache-load needs a run without it before"):
        build(None, 30, tmp_path / "empty", **fields, fast_cache_load=True)


def test_a_split_without_a_token_is_refused_where_megatron_would_count_epochs_for_ever(
    files: list[str], tmp_path: Path
) -> None:
    for data_order in order.ORDERS:
        with pytest.raises(InputError, match=r"valid split of .*few holds no token \(0 documents\), and 2 samples"):
            build((files[2:], None), 5, tmp_path, split="99,1,0", data_order=data_order)
    train, _, test = build((files[2:], None), 5, tmp_path)
    assert len(texts(train, 5)) == 5 and test is None
