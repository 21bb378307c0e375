"""A step of a run again: its samples, traced to their documents, from what the run wrote down.

The datasets are built as the run built them, from the arguments in RUN/run.json or in a checkpoint, with
their indices in a temporary folder; no model, no process group, no GPU. What a launch had behind it when it
began is in run.json, so a change of the batch size between launches is no obstacle.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.data import order
from megatron_ledom.data.dataset import CheckedDataset, check_datasets
from megatron_ledom.data.provenance import SampleOrigin, Tracer
from megatron_ledom.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction, to_natural_order
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.train.datasets import Datasets, batch_size, build_dataset_config, data_prefixes, num_train_samples
from megatron_ledom.train.order_guard import compare_orders, describe_order
from megatron_ledom.train.run_directory import read_run


@dataclass(frozen=True)
class Launch:
    """What must be known of a launch to say what it read: its arguments, and what lay behind it when it began."""

    args: argparse.Namespace
    start_steps: int
    start_samples: int
    folder: Path


@dataclass(frozen=True)
class TracedSample:
    """A sample of a step, and who read it: the number of the micro-batch, from 0, and the data-parallel rank."""

    origin: SampleOrigin
    micro_batch: int
    rank: int


def find_launch(run: Path, step: int) -> Launch:
    """Find the launch that took `step`: where a resume took steps again, the later one.

    Raises:
        InputError: RUN/run.json is missing or does not reach that step.
    """
    launches = read_run(run)["launches"]
    for launch in sorted(launches, key=lambda each: each["started_utc"], reverse=True):
        start = launch.get("start") or {"steps": 0, "samples": 0}
        if start["steps"] < step:
            args = argparse.Namespace(**launch["megatron_arguments"])
            return Launch(args, start["steps"], start["samples"], Path(launch.get("working_directory", ".")))
    raise InputError(f"{run}/run.json lists no launch that took step {step}")


def launch_of_checkpoint(path: Path) -> Launch:
    """Take a checkpoint for the launch that wrote it; before it, the batch size is taken to have been the same.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint = Checkpoint.open(path)
    args = checkpoint.args
    samples = int(getattr(args, "consumed_train_samples", 0))
    return Launch(args, checkpoint.iteration, samples, Path())


def trace_step(
    launch: Launch, step: int, tokenizer_folder: Path | None = None
) -> tuple[list[TracedSample], Tokenizer, Datasets]:
    """Trace the global batch of one step.

    Args:
        launch: from `find_launch` or `launch_of_checkpoint`.
        step: the optimizer step, from 1 as in the log.
        tokenizer_folder: RUN/tokenizer, which is taken where it exists.

    Returns:
        Its samples in the order in which they are read, the tokenizer, and what is known of the datasets.

    Raises:
        UsageError: the step lies outside the run, or its batch is not known.
        InputError: the data is missing, or is not what the run read.
    """
    from megatron_ledom.data.megatron_dataset import build_datasets

    args = _settings(launch)
    tokenizer = _load_tokenizer(args, tokenizer_folder)
    datasets = _check_data(args, tokenizer)
    recorded = getattr(args, "data_order_record", None)
    differing = compare_orders(recorded, describe_order(args, datasets)) if recorded else []
    if differing:
        raise InputError(f"the data is not what the run read: {'; '.join(differing)}. Bring back the files of the run")
    start = launch.start_samples + (step - 1 - launch.start_steps) * batch_size(args)
    length = num_train_samples(args)
    if step < 1 or start < 0 or start >= length:
        raise UsageError(f"--step {step} lies outside the run: it reads {length:,} samples, {batch_size(args)} a step")
    config = build_dataset_config(args, datasets, _tokenizer_facts(tokenizer))
    if config.blend_per_split is None:
        config.split_matrix = [config.split_matrix[0], None, None]  # training alone
    else:
        config.blend_per_split = [config.blend_per_split[0], None, None]
    with tempfile.TemporaryDirectory(prefix="which_documents_") as cache:
        config.path_to_cache = cache
        train, _, _ = build_datasets(config, (length, 0, 0))
        places = sample_places(args, start, len(train))
        tracer = Tracer(train, datasets)
        return [TracedSample(tracer.trace(p), m, r) for p, m, r in places], tokenizer, datasets


def _settings(launch: Launch) -> argparse.Namespace:
    args = argparse.Namespace(**vars(launch.args))
    args.data_order = getattr(args, "data_order", None) or order.MEGATRON
    args.data_budget = getattr(args, "data_budget", None)
    args.pack_pairs = getattr(args, "pack_pairs", False)
    if args.mock_data:
        raise UsageError("the run was trained on --mock-data: there are no documents behind it")
    if args.rampup_batch_size:
        raise UsageError("the run has --rampup-batch-size: which samples a step took is not known to this tool")
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(args, name, None)
        if words:
            setattr(args, name, [_find(word, launch.folder) for word in words])
    # How the run found its indices does not matter here.
    args.data_cache_path = args.per_dataset_sequences_path = None
    args.dataloader_fast_cache_load = args.dataloader_defer_npy_index_mmap = False
    args.create_attention_mask_in_dataloader = False
    return args


def _find(word: str, folder: Path) -> str:
    """A prefix as it was given, or below the folder in which the run was started."""
    is_here = Path(f"{word}.idx").is_file()
    return str(folder / word) if not is_here and Path(f"{folder / word}.idx").is_file() else word


def _load_tokenizer(args: argparse.Namespace, folder: Path | None) -> Tokenizer:
    has_copy = folder is not None and folder.is_dir() and args.tokenizer_type != "GPT2BPETokenizer"
    model = folder if has_copy else args.tokenizer_model
    return load_tokenizer(args.tokenizer_type, model, vocab_file=args.vocab_file, merge_file=args.merge_file)


def _check_data(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, CheckedDataset]:
    prefixes = data_prefixes(args)
    found = check_datasets(
        prefixes,
        direction=Direction.parse(args.direction, where="the run, argument 'direction'"),
        tokenizer_fingerprint=tokenizer.fingerprint,
        eod_id=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
    )
    return dict(zip(prefixes, found, strict=True))


def _tokenizer_facts(tokenizer: Tokenizer) -> Any:
    """What Megatron's datasets ask of a tokenizer."""
    return SimpleNamespace(
        eod=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        unique_identifiers={"fingerprint": tokenizer.fingerprint},
    )


def sample_places(args: argparse.Namespace, start: int, num_samples: int) -> Iterator[tuple[int, int, int]]:
    """The samples of the batch that begins after `start` samples: (position, micro-batch, data-parallel rank)."""
    ranks, size, batch = args.data_parallel_size, args.micro_batch_size, batch_size(args)
    if (args.dataloader_type or "single") == "single":
        for number in range(batch):
            yield start + number, number // (size * ranks), number % (size * ranks) // size
        return
    if args.dataloader_type != "cyclic":
        raise UsageError(f"--dataloader-type {args.dataloader_type}: which samples a step took is not known here")
    readers = [_cyclic_reader(args, start, num_samples, rank) for rank in range(ranks)]
    for micro_batch, rank in itertools.product(range(batch // (size * ranks)), range(ranks)):
        for position in next(readers[rank]):
            yield position, micro_batch, rank


def _cyclic_reader(args: argparse.Namespace, start: int, num_samples: int, rank: int) -> Iterator[list[int]]:
    """The micro-batches of one rank under `--dataloader-type cyclic`, from Megatron's own sampler."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingRandomSampler

    sampler = MegatronPretrainingRandomSampler(
        dataset=None,
        total_samples=num_samples,
        consumed_samples=start,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=args.data_parallel_size,
        data_sharding=args.data_sharding,
    )
    while True:
        yield from sampler


def describe_step(
    samples: list[TracedSample], tokenizer: Tokenizer, datasets: Datasets, chars: int
) -> list[dict[str, Any]]:
    """The samples of a step as plain values: where each comes from, its ids, and its text in both directions.

    Args:
        samples: from `trace_step`.
        tokenizer: of the run.
        datasets: what is known of each prefix.
        chars: characters of a document's text to keep; 0 for all.
    """
    described = []
    for sample in samples:
        origin = sample.origin
        direction = datasets[origin.prefix].read_as
        parts = []
        for part in origin.parts:
            ids = part.ids[:-1] if part.has_eod else part.ids
            natural = tokenizer.decode(to_natural_order(ids, direction))
            pieces = "".join(tokenizer.decode([i]) for i in part.ids)
            parts.append(
                {
                    "document": part.document,
                    "tokens": part.num_tokens,
                    "model_range": list(part.model_range),
                    "natural_range": list(part.natural_range),
                    "source": part.source,
                    "row": part.row,
                    "text_natural": shorten(natural, chars),
                    "text_as_read": shorten(pieces, chars),
                }
            )
        described.append(
            {
                "position": origin.position,
                "micro_batch": sample.micro_batch,
                "data_parallel_rank": sample.rank,
                "dataset": origin.prefix,
                "is_read_backwards": datasets[origin.prefix].is_turned,
                "sample": origin.sample,
                "epoch": origin.epoch,
                "ids": origin.ids,
                "documents": parts,
            }
        )
    return described


def shorten(text: str, chars: int) -> str:
    """Cut the middle out of a long text; 0 keeps it whole.

    >>> shorten("Once upon a time", 9)
    'Once ...time'
    """
    if not chars or len(text) <= chars:
        return text
    head = (chars + 1) // 2
    return f"{text[:head]}...{text[len(text) - (chars - head) :]}"


def format_step(step: int, described: list[dict[str, Any]]) -> str:
    """Write what `describe_step` returns for people."""
    first, last = described[0]["position"], described[-1]["position"]
    lines = [f"step {step}: {len(described)} samples, numbers {first:,} to {last:,} of the run"]
    for sample in described:
        epoch = "" if sample["epoch"] is None else f", epoch {sample['epoch']}"
        backwards = ", read backwards" if sample["is_read_backwards"] else ""
        lines.append(
            f"\nsample {sample['position']:,} (micro-batch {sample['micro_batch']}, "
            f"rank {sample['data_parallel_rank']}): {sample['dataset']}, "
            f"its sample {sample['sample']:,}{epoch}{backwards}"
        )
        for part in sample["documents"]:
            origin = part["source"] or "source not recorded"
            row = "row not recorded" if part["row"] is None else f"row {part['row']:,}"
            start, end = part["natural_range"]
            lines.append(
                f"  document {part['document']:,}, tokens {start:,} to {end:,} of {part['tokens']:,} in reading order; "
                f"{origin}, {row}"
            )
            lines.append(f"    in reading order  {part['text_natural']!r}")
            lines.append(f"    as the model reads {part['text_as_read']!r}")
    return "\n".join(lines)
