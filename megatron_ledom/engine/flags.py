"""Our flags beside Megatron's, in the groups in which `--help` shows them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.direction import Direction
from megatron_ledom.engine.precision import add_precision_arguments
from megatron_ledom.engine.presets import PRESETS
from megatron_ledom.engine.watching import add_watch_arguments


def add_ledom_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that Megatron does not have."""
    group = parser.add_argument_group("megatron_ledom")
    presets = "; ".join(f"{p.name}: {p.summary}" for p in PRESETS.values())
    group.add_argument(
        "--preset", choices=[*PRESETS], help=f"a complete configuration that any flag overrides. {presets}"
    )
    group.add_argument(
        "--direction",
        choices=[str(d) for d in Direction],
        default=str(Direction.REVERSE),
        help="what is trained: a reverse model (default), or its forward twin. Data of the other direction is read "
        "backwards",
    )
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="cuda where torch sees one, else Megatron on the CPU with gloo (default: auto)",
    )
    group.add_argument(
        "--attention",
        choices=["auto", "megatron", "ledom"],
        default="auto",
        help="ledom: samples in natural order, in which a reverse model attends what follows and counts positions "
        "from the end; auto: the CPU kernels on samples in the model's order, on CUDA Megatron's own (default: auto)",
    )
    group.add_argument(
        "--layer-kernels",
        choices=["auto", "megatron", "ledom"],
        default="auto",
        help="what computes norms, SwiGLU and the loss: ledom, the fused CPU kernels (with them linear layers take "
        "oneDNN's fp32 products where these are faster); megatron, its own modules; auto: the kernels on the CPU "
        "(default: auto)",
    )
    group.add_argument(
        "--run-dir",
        type=Path,
        metavar="RUN",
        help="holds run.json, checkpoints/, tensorboard/ and tokenizer/; a run that has checkpoints there continues. "
        "Sets --save, --load and --tensorboard-dir, each of which can still be given; --load OTHER and --finetune "
        "count until the run has a checkpoint of its own",
    )
    _add_checkpoint_arguments(parser.add_argument_group("megatron_ledom, checkpoints"))
    _add_fault_arguments(parser.add_argument_group("megatron_ledom, faults (docs/bad_numbers.md)"))
    _add_data_arguments(parser.add_argument_group("megatron_ledom, data"))
    add_precision_arguments(parser.add_argument_group("megatron_ledom, precision"))
    add_watch_arguments(parser.add_argument_group("megatron_ledom, watching"))
    return parser


def _add_checkpoint_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--keep-last", type=int, metavar="K", help="delete older checkpoints than the last K (default: keep all)"
    )
    group.add_argument(
        "--keep-every", type=int, metavar="N", help="with --keep-last: besides, keep those of steps N, 2 N, 3 N ..."
    )
    group.add_argument(
        "--no-verify-checkpoint",
        action="store_false",
        dest="verify_checkpoint",
        help="load without comparing the files with the checksums written at save. By default every rank reads a share "
        "of them, and a damaged checkpoint is set aside for the one before it",
    )


def _add_fault_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--bad-numbers",
        choices=["stop", "skip", "rollback", "megatron"],
        default="stop",
        help="on NaN, infinity or a spike, before the update and on all ranks alike: stop; skip the batch; skip it and "
        "roll back to the last checkpoint's weights; or leave it to Megatron's rerun machinery (default: stop)",
    )
    group.add_argument(
        "--bad-numbers-budget",
        type=int,
        default=10,
        metavar="N",
        help="skip or roll back at most N times in the whole run, then stop (default: 10)",
    )
    group.add_argument(
        "--spike-sigmas",
        type=float,
        metavar="X",
        help="a loss more than X standard deviations above the mean of the last 128 is a spike (default: none is)",
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="name a rank that gives no sign, or holds up the others, for so long, and end the job; 0: never "
        "(default: 0.8 of --distributed-timeout-minutes)",
    )
    group.add_argument(
        "--inject-fault",
        nargs="+",
        metavar="KIND@STEP[:RANK]",
        help="a drill: nan, inf, spike, hang (SIGSTOP) or kill (SIGKILL) at a step, on a rank (default: rank 0)",
    )


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data-order",
        choices=["epochs", "megatron"],
        help="epochs: a longer run only continues a shorter one's order. megatron: the library's, which the length "
        "decides. Default: the checkpoint's that the run continues, else epochs (docs/data_order.md)",
    )
    group.add_argument(
        "--force-data-order-change",
        action="store_true",
        help="continue a checkpoint although the samples will come in another order: some are read twice, some never",
    )
    group.add_argument(
        "--data-budget",
        nargs="+",
        metavar="TOKENS:PREFIX",
        help="tokens to read of each source (284B:data/a 103B:data/b) in place of --data-path and its weights; "
        "sets the length of the run where no flag names one",
    )
    group.add_argument(
        "--warn-epochs",
        type=float,
        default=4.0,
        metavar="N",
        help="warn of a source that is read more than N times (default: 4)",
    )
    group.add_argument(
        "--pack-pairs",
        action="store_true",
        help="of pairs (tools/preprocess_pairs.py): as many as fit into a sample, each seeing itself alone. Without it "
        "a sample is one pair and padding",
    )
    group.add_argument(
        "--data-report-only",
        action="store_true",
        help="print what would be read of each source, and exit; needs no torchrun",
    )
