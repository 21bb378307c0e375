"""A resume that would read other samples than before is refused with both values; one that would not goes on."""

from __future__ import annotations

import argparse
import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ledom.data.dataset import CheckedDataset, check_datasets
from megatron_ledom.data.megatron_dataset import build_datasets
from megatron_ledom.data.order import EPOCHS, MEGATRON
from megatron_ledom.direction import Direction
from megatron_ledom.engine.arguments import build_saved_arguments
from megatron_ledom.errors import UsageError
from megatron_ledom.train.datasets import build_dataset_config
from megatron_ledom.train.order_guard import settle_order

Datasets = dict[str, CheckedDataset]
LENGTHS = {"large": [40] * 50, "small": [30] * 20, "other": [25] * 20}  # 2,000, 600 and 500 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard")
    for name, lengths in LENGTHS.items():
        write(path / name, lengths)
    return path


def write(prefix: Path, lengths: list[int]) -> None:
    """A file of Megatron's own, whose ids count up from 1."""
    builder, start = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16), 1
    for length in lengths:
        builder.add_document(torch.arange(start, start + length), [length])
        start += length
    builder.finalize(f"{prefix}.idx")


@functools.cache
def default_arguments() -> argparse.Namespace:
    return build_saved_arguments({})


def arguments(folder: Path, *names: str, **changes: Any) -> tuple[argparse.Namespace, Datasets]:
    """A run of 20 steps of 4 samples of 16 tokens over the named datasets, 1,280 tokens in all."""
    words = [str(folder / n) if n in LENGTHS else n for n in names]
    settings = {
        "data_path": words,
        "split": "100,0,0",
        "seq_length": 16,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "train_iters": 20,
        "load": "RUN",
        "data_parallel_size": 2,
    }
    args = copy.deepcopy(default_arguments())
    vars(args).update(settings | changes)
    prefixes = [w for w in words if "/" in w]
    found = check_datasets(prefixes, direction=Direction.FORWARD, tokenizer_fingerprint=None, eod_id=0, vocab_size=5000)
    return args, dict(zip(prefixes, found, strict=True))


def resume(
    folder: Path, before: dict[str, Any], now: dict[str, Any], names: Any = ("large",), later: Any = None
) -> argparse.Namespace:
    """Start a run with `before`, take its arguments for a checkpoint's, and go on with `now`."""
    written, datasets = arguments(folder, *names, **before)
    settle_order(written, datasets, None)
    args, datasets = arguments(folder, *(later or names), **now)
    settle_order(args, datasets, copy.deepcopy(written))
    return args


def test_a_fresh_run_reads_by_epochs_and_a_resume_keeps_what_its_checkpoint_says(folder: Path) -> None:
    assert resume(folder, {}, {}).data_order == EPOCHS
    assert resume(folder, {"data_order": MEGATRON}, {}).data_order == MEGATRON
    with pytest.raises(UsageError, match="order was megatron, is epochs"):
        resume(folder, {"data_order": MEGATRON}, {"data_order": EPOCHS})


def test_length_layout_and_batch_size_are_free_by_epochs(folder: Path) -> None:
    """Also for a blend, and from 0.6 epochs to 32."""
    for names in (("large",), ("3", "large", "1", "small"), ("large", "small", "other")):
        for now in ({"train_iters": 1000}, {"train_iters": 5}, {"global_batch_size": 8, "data_parallel_size": 1}):
            assert resume(folder, {}, now, names).data_order == EPOCHS


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 7}, "--seed was 1234, is 7"),
    "sequence length": ({"seq_length": 32}, "--seq-length was 16, is 32"),
    "split": ({"split": "90,10,0"}, r"--split \(share of training\) was 1.0, is 0.9"),
    "sampler": ({"dataloader_type": "cyclic"}, "--dataloader-type was single, is cyclic"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_decides_the_order_is_compared_unless_forced(folder: Path, case: str) -> None:
    now, message = DIFFERENT[case]
    with pytest.raises(UsageError, match=f"{message}.*--force-data-order-change"):
        resume(folder, {}, now)
    assert resume(folder, {}, now | {"force_data_order_change": True}).data_order == EPOCHS
    assert resume(folder, {}, now | {"finetune": True}).data_order == EPOCHS


def test_data_is_compared_by_what_it_is(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data was 1 .*large .*, is 1 .*small"):
        resume(folder, {}, {}, ("large",), ("small",))
    with pytest.raises(UsageError, match=r"data was 0.75 .*large .*, is 0.6 "):
        resume(folder, {}, {}, ("3", "large", "1", "small"), ("3", "large", "2", "small"))
    assert resume(folder, {}, {}, ("3", "large", "1", "small"), ("75", "large", "25", "small")).data_order == EPOCHS
    for name in LENGTHS:  # moved, and the same
        write(tmp_path / name, LENGTHS[name])
    written, datasets = arguments(folder, "large")
    settle_order(written, datasets, None)
    settle_order(*arguments(tmp_path, "large"), written)
    write(tmp_path / "large", [40] * 51)
    with pytest.raises(UsageError, match=r"4000 bytes, 50 documents.*4080 bytes, 51 documents"):
        settle_order(*arguments(tmp_path, "large"), written)


@pytest.mark.parametrize(
    ("before", "now", "is_kept"),
    [(20, 31, True), (20, 32, False), (33, 40, True), (33, 58, False), (20, 19, True), (58, 62, True), (60, 63, False)],
)
def test_megatrons_order_is_refused_where_the_length_changes_it(
    folder: Path, before: int, now: int, is_kept: bool
) -> None:
    """124 samples an epoch of `large`, 31 steps; from 80 % of a second one (56 steps) it is shuffled with the first."""
    runs = {"data_order": MEGATRON, "train_iters": before}, {"train_iters": now}
    if is_kept:
        assert resume(folder, *runs).data_order == MEGATRON
    else:
        with pytest.raises(UsageError, match="the length of the run, by which Megatron shuffles"):
            resume(folder, *runs)


def test_megatrons_order_of_a_blend_changes_with_any_of_its_sources(folder: Path) -> None:
    names = ("3", "large", "1", "small")
    assert resume(folder, {"data_order": MEGATRON}, {"train_iters": 36}, names).data_order == MEGATRON
    with pytest.raises(UsageError, match=r"were \[\[1, False\], \[1, False\]\], are \[\[1, False\], \[2, True\]\]"):
        resume(folder, {"data_order": MEGATRON}, {"train_iters": 38}, names)
    assert resume(folder, {"data_order": MEGATRON}, {"train_iters": 2000}, ("large", "small", "other"))


def test_megatron_does_what_is_foreseen_of_its_blends(folder: Path, tmp_path: Path) -> None:
    """The same 80 samples where the guard lets a longer run pass, others where it does not."""
    tokenizer = SimpleNamespace(eod=0, pad=-1, vocab_size=5000, unique_identifiers={})
    read = {}
    for steps in (20, 36, 38):
        args, datasets = arguments(folder, "3", "large", "1", "small", data_order=MEGATRON, train_iters=steps)
        args.data_cache_path = str(tmp_path)
        args.create_attention_mask_in_dataloader = False
        train, _, _ = build_datasets(build_dataset_config(args, datasets, tokenizer), (4 * steps, 0, 0))
        read[steps] = [train[i]["tokens"].tolist() for i in range(80)]
    assert read[20] == read[36] != read[38]


def test_the_cyclic_sampler_depends_on_layout_and_length(folder: Path) -> None:
    cyclic = {"dataloader_type": "cyclic"}
    assert resume(folder, cyclic, cyclic).data_order == EPOCHS
    for change, message in (
        ({"data_parallel_size": 4}, "data-parallel size was 2, is 4"),
        ({"micro_batch_size": 2}, "--micro-batch-size was 1, is 2"),
        ({"train_iters": 21}, "samples was 80, is 84"),
    ):
        with pytest.raises(UsageError, match=f"{message} .with --dataloader-type cyclic"):
            resume(folder, cyclic, cyclic | change)


def test_a_checkpoint_without_a_record_was_megatrons(folder: Path, tmp_path: Path) -> None:
    old, _ = arguments(folder, "large")
    for name in ("data_order", "data_order_record", "data_budget"):
        old.__dict__.pop(name, None)
    for now, message in (
        ({}, None),
        ({"train_iters": 31}, None),
        ({"train_iters": 40}, "the length of the run"),
        ({"data_order": EPOCHS}, "order was megatron, is epochs"),
        ({"seed": 7}, "--seed was 1234, is 7"),
    ):
        args, datasets = arguments(folder, "large", **now)
        if message is None:
            settle_order(args, datasets, old)
            assert args.data_order == MEGATRON and args.data_order_record["megatron_epochs"] == [[1, False]]
        else:
            with pytest.raises(UsageError, match=message):
                settle_order(args, datasets, old)
    with pytest.raises(UsageError, match=r"data was /\S*large \(not named by this run\), is 1 .*small"):
        settle_order(*arguments(folder, "small"), old)
    write(tmp_path / "large", LENGTHS["large"])
    settle_order(*arguments(tmp_path, "large"), old)  # moved
