"""The data of a run: from Megatron's flags to its blend, its plan and its datasets.

It owns how flags and the facts of `data/dataset.py` become one configuration, so that a
training run, its report beforehand and `tools/which_documents.py` afterwards read the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ledom.data import order
from megatron_ledom.data.blend import BlendSource, count_text, format_plan, plan_blend
from megatron_ledom.data.dataset import CheckedDataset, sequence_lengths
from megatron_ledom.data.pairs import pack
from megatron_ledom.direction import Direction
from megatron_ledom.engine.budget import budget_steps, check_budget, parse_budgets
from megatron_ledom.errors import UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.train.lifecycle import StopRequest, count_cut_evaluation

if TYPE_CHECKING:
    from megatron_ledom.data.megatron_dataset import DatasetConfig
    from megatron_ledom.model.attention import AttentionPlan

Blend = tuple[list[str], list[float] | None]
Datasets = Mapping[str, CheckedDataset]


def read_blends(args: argparse.Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """Read Megatron's data flags: one blend for all splits, or one for each; (None, None) with `--mock-data`."""
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        return None, None
    blend, per_split = get_blend_and_blend_per_split(args)
    return blend, per_split


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """Return the dataset prefixes that the data flags name, without their weights; [] with `--mock-data`."""
    blend, per_split = read_blends(args)
    blends = [blend] if blend is not None else [b for b in (per_split or []) if b is not None]
    return list(dict.fromkeys(prefix for prefixes, _weights in blends for prefix in prefixes))


def weighted_blends(
    args: argparse.Namespace, datasets: Datasets, data_order: str
) -> tuple[Blend | None, list[Blend | None] | None]:
    """The blends as they are built: in the order `epochs` sources without weights are weighted by their tokens.

    Megatron reads such sources at most once and takes their samples for weights, which is the same proportion; it
    ends with an error where more is asked for. Its way stays where it needs it (whole validation sets).
    """
    blend, per_split = read_blends(args)
    whole_valid = bool(args.full_validation or args.multiple_validation_sets)

    def fill(each: Blend | None) -> Blend | None:
        if data_order != order.EPOCHS or each is None or each[1] is not None or len(each[0]) == 1:
            return each
        return each[0], [float(datasets[prefix].num_tokens) for prefix in each[0]]

    if blend is not None:
        return (blend if whole_valid else fill(blend)), None
    if per_split is None:
        return None, None
    return None, [each if split == "valid" and whole_valid else fill(each) for split, each in _by_split(per_split)]


def _by_split(per_split: list[Blend | None]) -> list[tuple[str, Blend | None]]:
    return list(zip(order.SPLITS, per_split, strict=True))


def train_sources(args: argparse.Namespace, datasets: Datasets, data_order: str) -> list[BlendSource]:
    """The sources of the training split: weights as given (of one source, 1), tokens counted in the index files."""
    blend, per_split = weighted_blends(args, datasets, data_order)
    train = blend if blend is not None else (per_split or [None])[0]
    if train is None:
        return []
    share = 1.0 if blend is None else train_share(args.split)
    budgets = {b.prefix: b.tokens for b in parse_budgets(args.data_budget or [])}
    prefixes, weights = train
    tokens = [_split_tokens(prefix, share) for prefix in prefixes]
    given: Sequence[float] = [float(t) for t in tokens] if weights is None else weights
    return [
        BlendSource(prefix, weight, count, budgets.get(prefix), _num_samples(args, datasets.get(prefix), share))
        for prefix, weight, count in zip(prefixes, given, tokens, strict=True)
    ]


def _num_samples(args: argparse.Namespace, dataset: CheckedDataset | None, share: float) -> int | None:
    """Samples of whole pairs in the training split; None where samples are cut out of a stream."""
    if dataset is None or dataset.pairs is None:
        return None
    lengths = sequence_lengths(dataset.prefix)
    lengths = lengths[: round(share * float(len(lengths)))]
    if not args.pack_pairs or int(lengths.max(initial=0)) > args.seq_length:  # the dataset will refuse what is too long
        return len(lengths)
    return len(pack(lengths, args.seq_length))


def train_share(split: str) -> float:
    """The share of the documents that `--split` gives to training; they are the first ones of each file."""
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    return float(parse_and_normalize_split(split)[0])


def _split_tokens(prefix: str, share: float) -> int:
    lengths = sequence_lengths(prefix)
    return int(lengths[: round(share * float(len(lengths)))].sum(dtype=np.int64))


def batch_size(args: argparse.Namespace) -> int:
    """Samples a step; before Megatron has validated the arguments, its default for a missing `--global-batch-size`."""
    if args.global_batch_size:
        return int(args.global_batch_size)
    if not args.micro_batch_size:
        raise UsageError("--global-batch-size is missing: nobody knows how many samples a step takes")
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return int(args.micro_batch_size) * max(1, args.world_size // ranks)


def num_train_samples(args: argparse.Namespace) -> int:
    """Samples that the run reads from its first step to its last."""
    return int(args.train_samples or (args.train_iters or 0) * batch_size(args))


def length_from_budget(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """`train_iters` where a budget is given and no flag names a length, for the parser's defaults; else nothing.

    Raises:
        UsageError: the length that a flag names reads more than the budget allows.
    """
    if not args.data_budget:
        return {}
    budgets = parse_budgets(args.data_budget)
    if {word.split("=", 1)[0] for word in argv} & {"--train-iters", "--train-samples"}:
        check_budget(budgets, num_train_samples(args), args.seq_length, batch_size(args))
        return {}
    return {"train_iters": budget_steps(budgets, args.seq_length, batch_size(args))}


def report_plan(args: argparse.Namespace, datasets: Datasets, data_order: str) -> str:
    """Warn of what is read too often, and return the plan as text."""
    sources, num_samples = train_sources(args, datasets, data_order), num_train_samples(args)
    plans = plan_blend(sources, num_samples, args.seq_length)
    for plan in plans:
        if plan.epochs > args.warn_epochs:
            get_logger(__name__).warning(
                "warning: %s is read %.3g times (%s of %s tokens): more than --warn-epochs %g",
                *(plan.source.prefix, plan.epochs, count_text(plan.tokens), count_text(plan.source.num_tokens)),
                args.warn_epochs,
            )
    return format_plan(plans, num_samples=num_samples, seq_length=args.seq_length, batch_size=batch_size(args))


def build_dataset_config(
    args: argparse.Namespace, datasets: Datasets, tokenizer: Any, plan: AttentionPlan | None = None
) -> DatasetConfig:
    """Turn Megatron's data flags, and what was found out about the files, into the datasets' configuration.

    Args:
        args: Megatron's namespace with ours.
        datasets: prefix to what is known of it.
        tokenizer: Megatron's.
        plan: what computes attention; None for Megatron's own.
    """
    from megatron_ledom.data.megatron_dataset import DatasetConfig

    blend, blend_per_split = weighted_blends(args, datasets, args.data_order)
    has_bounds = plan is not None and plan.is_ours
    return DatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader and not has_bounds,
        document_bounds=(args.reset_attention_mask or args.pack_pairs) and has_bounds,
        turned_samples=plan is not None and plan.needs_turned_samples,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        object_storage_cache_path=args.object_storage_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=_read_sequences_per_dataset(args.per_dataset_sequences_path),
        data_order=args.data_order,
        pairs={prefix: dataset.pairs for prefix, dataset in datasets.items() if dataset.pairs is not None},
        pair_direction=Direction(args.direction),
        pack_pairs=args.pack_pairs,
        turned={prefix: dataset.is_closed for prefix, dataset in datasets.items() if dataset.is_turned},
        identities={prefix: identity(dataset) for prefix, dataset in datasets.items()},
    )


def identity(dataset: CheckedDataset) -> str:
    """What the bytes of a dataset are, as far as it is known without reading them."""
    return dataset.bin_sha256 or f"{dataset.bin_bytes} bytes, {dataset.num_documents} documents"


def _read_sequences_per_dataset(path: str | None) -> dict[str, Any] | None:
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def build_datasets_provider(
    datasets: Datasets, plan: AttentionPlan, stop: StopRequest
) -> Callable[..., tuple[Any, Any, Any]]:
    """Return Megatron's dataset provider: (train, valid, test) sizes in samples -> three datasets.

    Every rank opens the files itself (`is_distributed`): they are memory-mapped, so the
    ranks of a node share the pages and no batch is broadcast over tensor-parallel ranks.
    """

    def provide(num_samples: Sequence[int | None], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        """Build the three datasets; every virtual stage gets its own, alike."""
        from megatron.training import get_args, get_tokenizer

        from megatron_ledom.data.megatron_dataset import build_datasets

        args = get_args()
        count_cut_evaluation(args)
        built = build_datasets(build_dataset_config(args, datasets, get_tokenizer(), plan), num_samples)
        stop.leave_startup(args)  # of what Megatron calls, this comes last before the first step
        return built

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide
