"""The same layout at reduced width: a command line for a run that a laptop finishes in seconds.

Kept, because the layout acts on it: tensor, pipeline and virtual pipeline parallelism, sequence parallelism, the
distributed optimizer, recomputation, the number of heads and of key heads, tied or untied tables, every other flag.
Reduced: hidden size, head size, MLP width, layers of a stage, sequence, batch, vocabulary, and data parallelism (two
copies show what many do). The twin runs on the CPU in fp32, where a difference is a fault and not rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ledom.engine.presets import get_preset
from megatron_ledom.errors import UsageError

HIDDEN, FFN, HEAD_DIM, SEQ_LENGTH, VOCABULARY = 64, 128, 16, 64, 1023
LAYERS_PER_CHUNK = 2
START_STEPS, CHECKED_STEPS = 19, 20
"""Steps before the comparison, so that Adam's moments are filled, and steps that are compared."""

ONE_VALUE: tuple[str, ...] = (
    # What the twin decides itself, whatever the command line says.
    *("--num-layers", "--hidden-size", "--ffn-hidden-size", "--kv-channels", "--seq-length"),
    *("--max-position-embeddings", "--micro-batch-size", "--global-batch-size", "--train-iters"),
    *("--train-samples", "--lr-warmup-iters", "--lr-warmup-samples", "--lr-decay-iters", "--lr-decay-samples"),
    *("--lr", "--min-lr", "--lr-decay-style", "--lr-warmup-fraction", "--eval-iters", "--eval-interval"),
    *("--save-interval", "--save", "--load", "--run-dir", "--tensorboard-dir", "--pretrained-checkpoint"),
    *("--exit-interval", "--log-interval", "--tokenizer-type", "--tokenizer-model", "--vocab-file"),
    *("--merge-file", "--vocab-size", "--make-vocab-size-divisible-by", "--split", "--data-args-path"),
    *("--per-split-data-args-path", "--data-cache-path", "--num-layers-per-virtual-pipeline-stage"),
    *("--device", "--fp8-format", "--fp8-recipe", "--num-workers", "--dataloader-type", "--data-order"),
    *("--exit-duration-in-mins", "--timing-log-level", "--wandb-project", "--ckpt-step", "--init-method-std"),
    *("--transformer-impl", "--distributed-backend", "--attention-backend"),
)
MANY_VALUES = ("--data-path", "--data-budget", "--train-data-path", "--valid-data-path", "--test-data-path")
NO_VALUE = (
    *("--bf16", "--fp16", "--no-bf16", "--mock-data", "--use-checkpoint-args", "--async-save"),
    "--fp8-param-gather",
)


@dataclass(frozen=True)
class SmallTwin:
    """A small run with the layout of a large one.

    Attributes:
        flags: of `tools/pretrain.py`, without the layout and the run directory.
        layout: the flags of the layout alone.
        num_ranks: processes that the layout takes.
        describes: the layout in words.
        notes: what of the large layout the twin doesn't show.
    """

    flags: tuple[str, ...]
    layout: tuple[str, ...]
    num_ranks: int
    describes: str
    notes: tuple[str, ...]


def strip_flags(argv: Sequence[str]) -> list[str]:
    """Return `argv` without the flags that the twin decides itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ONE_VALUE:
        parser.add_argument(flag)
    for flag in MANY_VALUES:
        parser.add_argument(flag, nargs="*")
    for flag in NO_VALUE:
        parser.add_argument(flag, action="store_true")
    return parser.parse_known_args(list(argv))[1]


def split_layout(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide flags into those that the layout consists of and the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sizes = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
    for flag in (*sizes, "--num-virtual-stages-per-pipeline-rank"):
        parser.add_argument(flag)
    for flag in ("--sequence-parallel", "--no-sequence-parallel"):
        parser.add_argument(flag, action="store_true")
    others = parser.parse_known_args(list(argv))[1]
    left = list(others)
    layout = []
    for word in argv:
        if left and word == left[0]:
            left.pop(0)
        else:
            layout.append(word)
    return layout, others


def build_twin(argv: Sequence[str], args: argparse.Namespace, world_size: int, max_ranks: int) -> SmallTwin:
    """Reduce a run to one that this machine checks.

    Args:
        argv: the large run's command line.
        args: what Megatron's parser makes of it, preset included.
        world_size: GPUs of the large run.
        max_ranks: processes that may run here.

    Raises:
        UsageError: the layout takes more processes than that, or does not fit the number of GPUs.
    """
    tensor, pipeline = int(args.tensor_model_parallel_size), int(args.pipeline_model_parallel_size)
    copy = tensor * pipeline
    if world_size % copy:
        raise UsageError(f"{world_size} GPUs are no multiple of TP {tensor} x PP {pipeline} = {copy} ranks a copy")
    if copy > max_ranks:
        raise UsageError(
            f"TP {tensor} x PP {pipeline} takes {copy} processes here, --max-ranks is {max_ranks}: raise it "
            "(each takes about half a GiB and shares the cores), or check a smaller layout of the same kind"
        )
    data = world_size // copy
    kept = min(data, 2) if 2 * copy <= max_ranks else 1
    notes = [f"data parallelism of {data} is shown by {kept}"] if kept != data else []
    if data > 1 and kept == 1:
        notes.append(f"the gradients' reduction over data-parallel ranks is NOT checked (--max-ranks {max_ranks})")
    chunks = pipeline * _virtual_stages(args)
    is_even = args.num_layers % chunks == 0 and not _has_uneven_stages(args)
    layers = chunks * min(LAYERS_PER_CHUNK, args.num_layers // chunks) if is_even else args.num_layers
    micro_batches = 2 * pipeline if pipeline > 1 else 2
    layout_flags, others = split_layout(strip_flags(argv))
    batch = kept * micro_batches
    flags = [*_model_flags(args, layers), *_schedule_flags(batch), *_data_flags(), *_precision_flags(args)]
    layout = [f"TP {tensor}", f"PP {pipeline}", f"DP {kept}"]
    layout += ["sequence parallelism"] if _has_sequence_parallel(args) else []
    if _virtual_stages(args) > 1:
        layout.append(f"{_virtual_stages(args)} virtual stages a rank")
    explicit = _layout_flags(args, layers, layout_flags)
    words = " x ".join(layout[:3]) + _and(layout[3:])
    return SmallTwin((*others, *flags), tuple(explicit), copy * kept, words, tuple(notes))


def one_rank_flags(args: argparse.Namespace) -> list[str]:
    """The flags of the same run on one rank."""
    sizes = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    return [*sizes, *(["--no-sequence-parallel"] if _preset_sets(args, "sequence_parallel") else [])]


def _and(words: list[str]) -> str:
    return "".join(f", {word}" for word in words)


def _has_sequence_parallel(args: argparse.Namespace) -> bool:
    return bool(args.sequence_parallel) and int(args.tensor_model_parallel_size) > 1


def _virtual_stages(args: argparse.Namespace) -> int:
    per_stage = args.num_layers_per_virtual_pipeline_stage
    if per_stage:
        return int(args.num_layers // args.pipeline_model_parallel_size // per_stage)
    return int(getattr(args, "num_virtual_stages_per_pipeline_rank", None) or 1)


def _has_uneven_stages(args: argparse.Namespace) -> bool:
    names = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout")
    in_split = args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split
    return bool(in_split) or any(getattr(args, name, None) for name in names)


def _layout_flags(args: argparse.Namespace, layers: int, given: list[str]) -> list[str]:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    flags = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
    if args.num_layers_per_virtual_pipeline_stage:
        each = layers // pipeline // _virtual_stages(args)
        flags += ["--num-layers-per-virtual-pipeline-stage", str(each)]
    return [*given, *flags, *(["--sequence-parallel"] if _has_sequence_parallel(args) else [])]


def _model_flags(args: argparse.Namespace, layers: int) -> list[str]:
    tensor = int(args.tensor_model_parallel_size)
    ffn = -(-FFN // tensor) * tensor
    sizes = {"--num-layers": layers, "--hidden-size": HIDDEN, "--ffn-hidden-size": ffn, "--kv-channels": HEAD_DIM}
    sizes |= {"--seq-length": SEQ_LENGTH, "--max-position-embeddings": SEQ_LENGTH}
    return [*(str(word) for pair in sizes.items() for word in pair), "--init-method-std", "0.08"]


def _schedule_flags(batch: int) -> list[str]:
    last = START_STEPS + CHECKED_STEPS
    values: dict[str, Any] = {"--micro-batch-size": 1, "--global-batch-size": batch, "--train-iters": last}
    values |= {"--lr": 1e-3, "--min-lr": 1e-3, "--lr-decay-style": "constant", "--lr-warmup-fraction": 0.05}
    values |= {"--log-interval": 1, "--eval-interval": 10_000, "--eval-iters": 1, "--num-workers": 0}
    return [str(word) for pair in values.items() for word in pair]


def _data_flags() -> list[str]:
    vocabulary = ["--vocab-size", str(VOCABULARY), "--make-vocab-size-divisible-by", "64"]
    return ["--mock-data", "--tokenizer-type", "NullTokenizer", *vocabulary, "--device", "cpu"]


def _precision_flags(args: argparse.Namespace) -> list[str]:
    return ["--no-bf16"] if _preset_sets(args, "bf16") else []


def _preset_sets(args: argparse.Namespace, name: str) -> bool:
    """Whether a preset throws a switch; only then has Megatron's parser a flag that throws it back."""
    return bool(args.preset and get_preset(args.preset).settings.get(name))
