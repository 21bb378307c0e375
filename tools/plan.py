r"""Plan a run: which layouts fit into memory, how fast each would be, what the training costs. No GPU is needed.

python tools/plan.py --preset 7b --nodes 8 --gpus-per-node 8 --gpu h100 --output plan.png

Megatron's own flags stand beside these, as for tools/pretrain.py. docs/planning.md says how far the numbers hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ledom.cluster.plan_layouts import PRECISIONS
from megatron_ledom.cluster.plan_model import GPUS
from megatron_ledom.engine.presets import PRESETS
from megatron_ledom.errors import UsageError, run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=[*PRESETS], help="the model and its batch; or give Megatron's model flags")
    parser.add_argument("--nodes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="(default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=64_256, help="rows of the tables before padding (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=float, default=435e9, help="of the whole training (default: %(default).3g)")
    parser.add_argument(
        "--reserve-gib",
        type=float,
        default=5.0,
        help="memory that tensors do not get: CUDA, NCCL, workspaces, fragmentation (default: %(default)s)",
    )
    parser.add_argument("--show", type=int, default=6, help="layouts to find (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw memory and cost over nodes into this file")
    parser.add_argument(
        "--calibration", action="store_true", help="print the speed model beside published results, and end"
    )
    return parser


def main(argv: list[str]) -> int:
    """Print the plan, and draw it where asked to."""
    args, flags = build_parser().parse_known_args(argv)
    from megatron_ledom.cluster.plan_report import draw_plan, format_calibration, format_plan

    if args.calibration:
        print(format_calibration())
        return 0
    for name in ("nodes", "gpus_per_node", "show"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.output is not None and not args.output.parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no folder {args.output.parent}")
    from megatron_ledom.cluster.plan import Wish, make_plan

    wish = Wish(
        argv=(*(["--preset", args.preset] if args.preset else []), *flags),
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu=args.gpu,
        precision=args.precision,
        vocabulary=args.vocab_size,
        tokens=args.tokens,
        reserve_gib=args.reserve_gib,
        show=args.show,
    )
    plan = make_plan(wish)
    print(format_plan(plan))
    if args.output is not None:
        draw_plan(plan, args.output)
        print(f"drawn: {args.output}")
    return 0


if __name__ == "__main__":
    run_cli(main)
