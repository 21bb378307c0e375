"""`--precision`: the number formats of a run as Megatron's own arguments, and where each can run.

On a GPU a name becomes Megatron's and Transformer Engine's options, which any flag overrides. On the CPU the same name
is BF16 for Megatron, and `model.precision` emulates the recipe in every linear layer. It owns names, defaults and
refusals; it computes nothing.

    name             on a GPU (Megatron's flags)
    bf16             --bf16
    fp8-delayed      --bf16 --fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024
                     --fp8-amax-compute-algo max --fp8-param-gather
    fp8-tensorwise   --bf16 --fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather --first-last-layers-bf16
    fp8-blockwise    --bf16 --fp8-format e4m3 --fp8-recipe blockwise

None of them has run on a GPU of this project.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ledom.engine.device import Device
from megatron_ledom.errors import UsageError

WARN, STOP, SWITCH = "warn", "stop", "switch"
HISTORY_LENGTH = 1024
EMULATED_DEFAULTS = ("first_last_layers_bf16", "fp8_amax_history_len")
"""Megatron's arguments that the emulation follows too."""

INSTALL = (
    "Install it for this torch (`pip install --no-build-isolation 'transformer-engine[pytorch]'`, or NVIDIA's PyTorch "
    "container, which has it)"
)


@dataclass(frozen=True)
class Precision:
    """A named choice of number formats.

    Attributes:
        name: as given to `--precision`.
        settings: Megatron argument to value, on a GPU.
        recipe: the FP8 recipe in Megatron's word; None for BF16.
        capability: the least compute capability of a GPU, times ten.
        engine_version: the first Transformer Engine that has the recipe.
    """

    name: str
    settings: dict[str, Any]
    recipe: str | None = None
    capability: int = 80
    engine_version: str = "0"


_DELAYED: dict[str, Any] = {
    "bf16": True,
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_amax_history_len": HISTORY_LENGTH,
    "fp8_amax_compute_algo": "max",
    "fp8_param_gather": True,
}
_TENSORWISE: dict[str, Any] = {
    "bf16": True,
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "fp8_param_gather": True,
    "first_last_layers_bf16": True,
}
_BLOCKWISE: dict[str, Any] = {"bf16": True, "fp8": "e4m3", "fp8_recipe": "blockwise"}  # powers of two need no E5M2

PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("bf16", {"bf16": True}),
        Precision("fp8-delayed", _DELAYED, "delayed", 89, "1.0"),
        Precision("fp8-tensorwise", _TENSORWISE, "tensorwise", 89, "2.2"),
        Precision("fp8-blockwise", _BLOCKWISE, "blockwise", 90, "2.3"),
    )
}


def add_precision_arguments(group: argparse._ArgumentGroup) -> None:
    """Add `--precision` and the flags of the shadow check."""
    group.add_argument(
        "--precision",
        choices=[*PRECISIONS],
        help="number formats of the linear layers; on a GPU Megatron's FP8 flags with Transformer Engine, on the CPU "
        "BF16 with the recipe emulated (docs/precision.md). Default: what the preset or Megatron's flags say",
    )
    group.add_argument(
        "--shadow-every",
        type=int,
        default=0,
        metavar="N",
        help="with FP8: every N steps compute the loss of a micro-batch in BF16 as well, and report the gap "
        "(default: 0, never)",
    )
    group.add_argument(
        "--shadow-tolerance",
        type=float,
        default=0.05,
        metavar="NATS",
        help="the largest gap, in nats a token, that is no breach (default: 0.05)",
    )
    group.add_argument(
        "--shadow-policy",
        choices=[WARN, STOP, SWITCH],
        default=WARN,
        help="on a breach: say it, stop the run, or go on in BF16 (default: warn)",
    )


def precision_defaults(name: str | None, device: Device) -> dict[str, Any]:
    """What `--precision` sets on Megatron's parser."""
    if name is None:
        return {}
    settings = PRECISIONS[name].settings
    if device == "cuda":
        return dict(settings)
    return {"bf16": True} | {key: settings[key] for key in EMULATED_DEFAULTS if key in settings}


def emulated_recipe(args: argparse.Namespace, device: Device) -> str | None:
    """The recipe that this run emulates; None where it computes without, or with Transformer Engine."""
    name = args.precision
    return PRECISIONS[name].recipe if name is not None and device == "cpu" else None


def check_precision(args: argparse.Namespace, device: Device, has_engine: bool) -> None:
    """Refuse number formats that cannot run here, in words.

    Args:
        args: Megatron's namespace with ours, not yet validated.
        device: the resolved device.
        has_engine: whether Transformer Engine can be imported.

    Raises:
        UsageError: naming the flag, what was found and what to do.
    """
    _check_agreement(args, device)
    _check_shadow(args, device)
    if device == "cpu":
        _check_emulation(args)
        return
    if not has_engine:
        _check_without_engine(args)
    elif args.fp8 is not None:
        check_gpu(args, _capability(), _engine_version())
        _check_shapes(args)


def _check_agreement(args: argparse.Namespace, device: Device) -> None:
    if args.precision is None:
        return
    if args.fp16 or not args.bf16:
        other = "--fp16" if args.fp16 else "--no-bf16"
        raise UsageError(f"--precision {args.precision} and {other}: what is not FP8 is BF16; give one of the two")
    if device == "cpu":
        return
    wanted = PRECISIONS[args.precision].recipe
    found = args.fp8_recipe if args.fp8 is not None else None
    if found != wanted:
        raise UsageError(
            f"--precision {args.precision} means the recipe {wanted or 'BF16'}, Megatron's flags say "
            f"{found or 'BF16'}: drop --precision or those flags"
        )
    if args.first_last_layers_bf16 and wanted == "delayed":
        raise UsageError(
            "--first-last-layers-bf16 and --precision fp8-delayed: delayed scales are updated once for all layers, "
            "so that none can be left out. Use fp8-tensorwise"
        )


def _check_shadow(args: argparse.Namespace, device: Device) -> None:
    if not args.shadow_every:
        return
    is_fp8 = args.fp8 is not None or emulated_recipe(args, device) is not None
    if not is_fp8:
        raise UsageError("--shadow-every compares FP8 with BF16, and this run has no FP8: drop it, or add --precision")
    if args.pipeline_model_parallel_size > 1:
        raise UsageError(
            "--shadow-every makes a second forward pass of a micro-batch, which a pipeline has no place for: use "
            "--pipeline-model-parallel-size 1, at reduced width if need be"
        )


def _check_emulation(args: argparse.Namespace) -> None:
    recipe = emulated_recipe(args, "cpu")
    if args.fp8 is not None or args.fp8_param_gather:
        flag = "--fp8-format" if args.fp8 is not None else "--fp8-param-gather"
        raise UsageError(
            f"{flag} is Transformer Engine's, which needs a GPU. On the CPU --precision fp8-delayed, fp8-tensorwise "
            "or fp8-blockwise emulates a recipe, with weights kept in BF16"
        )
    if recipe is None:
        return
    if args.num_experts is not None or args.multi_latent_attention or args.spec or args.normalization != "RMSNorm":
        raise UsageError(
            f"--precision {args.precision} is emulated in dense layers with RMSNorm only: drop --num-experts, "
            "--multi-latent-attention, --spec, or use --precision bf16"
        )
    has_second_pass = args.recompute_granularity == "full" or (
        args.recompute_granularity == "selective" and set(args.recompute_modules or ["core_attn"]) != {"core_attn"}
    )
    if recipe == "delayed" and has_second_pass:
        raise UsageError(
            "--precision fp8-delayed on the CPU cannot recompute linear layers: the second pass would find other "
            "scales. Drop --recompute-granularity, or choose fp8-tensorwise"
        )
    if args.first_last_layers_bf16 and recipe == "delayed":
        raise UsageError(
            "--first-last-layers-bf16 and --precision fp8-delayed: Megatron has no such combination. Use fp8-tensorwise"
        )


def _check_without_engine(args: argparse.Namespace) -> None:
    wanted = args.precision if args.precision and PRECISIONS[args.precision].recipe else None
    needs_it = {
        f"--precision {wanted}": wanted is not None,
        f"--transformer-impl {args.transformer_impl}": args.transformer_impl != "local",
        "--fp8-format": args.fp8 is not None,
        "--fp4-format": getattr(args, "fp4", None) is not None,
    }
    for flag, is_asked in needs_it.items():
        if is_asked:
            raise UsageError(
                f"{flag} needs Transformer Engine, which this Python cannot import. {INSTALL}, or drop the flag: "
                "Megatron's local layers then take its place"
                + (". To study a recipe without it: --device cpu, which emulates it" if wanted else "")
            )


def check_gpu(args: argparse.Namespace, capability: tuple[int, int], engine_version: str) -> None:
    """Refuse a recipe that this GPU or this Transformer Engine does not have.

    Args:
        args: with `fp8` set.
        capability: of the GPU, e.g. (9, 0) of an H100.
        engine_version: of Transformer Engine.

    Raises:
        UsageError: with what was found and which recipes would do.
    """
    known = {p.recipe: p for p in PRECISIONS.values() if p.recipe is not None}
    if args.fp8_recipe not in known:
        return  # mxfp8 and custom recipes are Megatron's business
    precision = known[args.fp8_recipe]
    if 10 * capability[0] + capability[1] < precision.capability:
        least = f"{precision.capability // 10}.{precision.capability % 10}"
        raise UsageError(
            f"the recipe {precision.recipe} needs a GPU of compute capability {least} or later, this one has "
            f"{capability[0]}.{capability[1]}: use --precision bf16"
            + (", fp8-tensorwise or fp8-delayed" if capability == (8, 9) else "")
        )
    if _numbers(engine_version) < _numbers(precision.engine_version):
        raise UsageError(
            f"the recipe {precision.recipe} needs Transformer Engine {precision.engine_version}, found "
            f"{engine_version}: install a newer one, or use --precision fp8-delayed"
        )
    if args.transformer_impl == "local":
        raise UsageError("--transformer-impl local has no FP8: drop it, or use --precision bf16")


def _check_shapes(args: argparse.Namespace) -> None:
    """FP8 matrix products want whole groups of 16 in both widths, and of 8 tokens."""
    for name, number, step in _shapes(args):
        if number % step:
            raise UsageError(f"FP8 needs {name} in multiples of {step}, found {number}: change it, or use BF16")


def _shapes(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    tensor = args.tensor_model_parallel_size
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    yield "--hidden-size", args.hidden_size, 16
    if args.ffn_hidden_size:
        yield f"--ffn-hidden-size over {tensor} tensor-parallel ranks", args.ffn_hidden_size // tensor, 16
    yield f"the heads' width over {tensor} ranks", args.num_attention_heads * head // tensor, 16
    if args.seq_length and args.micro_batch_size:
        yield "tokens of a micro-batch", args.seq_length * args.micro_batch_size, 8


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _capability() -> tuple[int, int]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


def _engine_version() -> str:
    from megatron.core.utils import get_te_version

    return str(get_te_version())
