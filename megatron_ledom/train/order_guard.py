"""A resume reads on where the run stopped, or is refused.

What decides the order of the samples is recorded in every checkpoint (`data_order_record` among its
arguments) and compared at a resume. Layouts do not enter: consecutive samples make a global batch,
however many ranks share it. Checkpoints without a record were written before there was another order
than Megatron's; they go on with it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ledom.data import order
from megatron_ledom.errors import UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.train.datasets import (
    Datasets,
    data_prefixes,
    identity,
    num_train_samples,
    read_blends,
    train_share,
    train_sources,
)

FORCE = "--force-data-order-change"
Record = dict[str, Any]


def settle_order(args: argparse.Namespace, datasets: Datasets, resumed: argparse.Namespace | None) -> None:
    """Decide which order the run reads in, and refuse a resume that would read another one than it has read so far.

    It sets `args.data_order` and `args.data_order_record`.

    Args:
        args: Megatron's namespace, validated.
        datasets: prefix -> what was found out about it; empty with `--mock-data`.
        resumed: the arguments of the checkpoint that is continued, or None at a fresh start.

    Raises:
        UsageError: naming what differs, with both values.
    """
    asked = args.data_order
    written = None if resumed is None or args.finetune else resumed
    args.data_order = asked or (order.EPOCHS if written is None else written_order(written))
    args.data_order_record = describe_order(args, datasets) if datasets else None
    if written is None or not datasets or getattr(written, "mock_data", False):
        return
    before = getattr(written, "data_order_record", None)
    if before is None:
        get_logger(__name__).info(
            "--load %s: its checkpoint does not record its data order, so it was Megatron's; the run goes on in %s",
            *(args.load, "that order" if args.data_order == order.MEGATRON else f"the order {args.data_order}"),
        )
        before = _reconstruct(written, datasets)
    differing = compare_orders(before, args.data_order_record)
    if not differing:
        return
    text = f"--load {args.load}: the samples would come in another order than before: {'; '.join(differing)}"
    if not args.force_data_order_change:
        raise UsageError(f"{text}. Give the same flags as before, or {FORCE} to read on in the new order")
    get_logger(__name__).warning("warning: %s. Forced: some samples are read twice, some never", text)


def written_order(written: argparse.Namespace) -> str:
    """The order in which a checkpoint's run has read; Megatron's where it does not say."""
    return str(getattr(written, "data_order", None) or order.MEGATRON)


def describe_order(args: argparse.Namespace, datasets: Datasets) -> Record:
    """Everything that decides which tokens sample n of the run holds, as plain values for a checkpoint."""
    sources = train_sources(args, datasets, args.data_order)
    total = sum(source.weight for source in sources)
    is_per_split = not (args.data_path or args.data_args_path)
    record: Record = {
        "order": args.data_order,
        "version": order.SCHEME_VERSION if args.data_order == order.EPOCHS else None,
        "--seed": args.seed,
        "--seq-length": args.seq_length,
        "--split (share of training)": None if is_per_split else round(train_share(args.split), 12),
        "--dataloader-type": args.dataloader_type or "single",
        "sources": [
            {
                "path": source.prefix,
                "identity": identity(datasets[source.prefix]),
                "weight": round(source.weight / total, 12) if len(sources) > 1 else 1.0,
            }
            for source in sources
        ],
    }
    if any(dataset.pairs for dataset in datasets.values()):
        record["--pack-pairs"] = args.pack_pairs
        record["loss on"] = [d.pairs and d.pairs.loss_on for d in datasets.values()]
    if args.data_order == order.MEGATRON:
        record["megatron_epochs"] = _megatron_epochs(args, [s.weight for s in sources], [s.num_tokens for s in sources])
    if record["--dataloader-type"] == "cyclic":  # Megatron's sampler permutes the whole dataset, divided among ranks
        record["cyclic"] = {
            "samples": num_train_samples(args),
            "data-parallel size": args.data_parallel_size,
            "--micro-batch-size": args.micro_batch_size,
            "--no-data-sharding": not args.data_sharding,
        }
    return record


def _megatron_epochs(args: argparse.Namespace, weights: list[float], tokens: list[int]) -> list[Any]:
    """How Megatron shuffles each source: it changes with the length of the run, and every position with it.

    Source: `_get_size_per_split_per_dataset`, which asks each source of a weighted blend for a margin.
    """
    num_samples = num_train_samples(args)
    if len(tokens) == 1 and not _has_weights(args):
        wanted: list[int | None] = [num_samples]
    elif not _has_weights(args):
        wanted = [None] * len(tokens)
    else:
        shares = [weight / sum(weights) for weight in weights]
        wanted = [math.ceil(math.ceil(num_samples * s) * (1 + args.mid_level_dataset_surplus)) for s in shares]
    epochs = [order.megatron_epochs(n, t, args.seq_length) for n, t in zip(wanted, tokens, strict=True)]
    return [[e.num_epochs, e.is_last_apart] for e in epochs]


def _has_weights(args: argparse.Namespace) -> bool:
    blend, per_split = read_blends(args)
    train = blend if blend is not None else (per_split or [None])[0]
    return train is not None and train[1] is not None


def _reconstruct(written: argparse.Namespace, datasets: Datasets) -> Record:
    """The record that a checkpoint without one would hold, as far as its arguments and the present files say."""
    by_name = {Path(prefix).name: dataset for prefix, dataset in datasets.items()}
    known = {prefix: datasets.get(prefix) or by_name.get(Path(prefix).name) for prefix in data_prefixes(written)}
    if None in known.values():
        named = [{"path": prefix, "identity": "not named by this run", "weight": None} for prefix in known]
        return {"order": order.MEGATRON, "sources": named}
    moved = argparse.Namespace(**vars(written))
    moved.data_order, moved.data_budget = order.MEGATRON, None
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(moved, name, None)
        if words:
            here = {prefix: dataset.prefix for prefix, dataset in known.items() if dataset is not None}
            setattr(moved, name, [here.get(word, word) for word in words])
    return describe_order(moved, datasets)


def compare_orders(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two records, each with both values; [] where sample n is the same in both."""
    differing = [
        f"{name} was {before[name]}, is {now[name]}"
        for name in now
        if name not in {"sources", "megatron_epochs", "cyclic"} and name in before and before[name] != now[name]
    ]
    sources = [[(s["identity"], s["weight"]) for s in record["sources"]] for record in (before, now)]
    if sources[0] != sources[1]:
        differing.append(f"data was {_sources_text(before)}, is {_sources_text(now)}")
    epochs_before, epochs_now = before.get("megatron_epochs"), now.get("megatron_epochs")
    if epochs_before and epochs_now and epochs_before != epochs_now:
        differing.append(
            f"the length of the run, by which Megatron shuffles: epochs laid together (and whether the last is apart) "
            f"were {epochs_before}, are {epochs_now}"
        )
    cyclic_before, cyclic_now = before.get("cyclic") or {}, now.get("cyclic") or {}
    if cyclic_before and cyclic_now:
        differing += [
            f"{name} was {cyclic_before[name]}, is {cyclic_now[name]} (with --dataloader-type cyclic)"
            for name in cyclic_now
            if cyclic_before[name] != cyclic_now[name]
        ]
    return differing


def _sources_text(record: Mapping[str, Any]) -> str:
    def text(source: Mapping[str, Any]) -> str:
        what = source["identity"] if " " in source["identity"] else source["identity"][:12]
        return (
            f"{source['path']} ({what})"
            if source["weight"] is None
            else f"{source['weight']:g} {source['path']} ({what})"
        )

    return ", ".join(text(source) for source in record["sources"])
