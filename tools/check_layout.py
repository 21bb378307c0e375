r"""Check that a layout computes what one rank computes, at reduced width on this machine's CPU, before it is launched.

python tools/check_layout.py --preset 7b --nodes 8 --gpus-per-node 8 && sbatch ...

The flags are those of tools/pretrain.py; data and run directory are not looked at. The exit status is 0 where losses,
gradients and twenty steps agree, 1 where they do not. docs/planning.md says what is kept and what is reduced.
"""

from __future__ import annotations

import argparse
import os

from megatron_ledom.engine.presets import PRESETS
from megatron_ledom.errors import UsageError, run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=[*PRESETS], help="the model; or give Megatron's model flags")
    parser.add_argument("--nodes", type=int, default=1, help="of the launch (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="of the launch (default: %(default)s)")
    parser.add_argument(
        "--max-ranks", type=int, default=8, help="processes that may run here at once (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each of three runs (default: 900)")
    return parser


def main(argv: list[str]) -> int:
    """Check, print the numbers, and say by the status whether to launch."""
    args, flags = build_parser().parse_known_args(argv)
    if args.nodes < 1 or args.gpus_per_node < 1 or args.max_ranks < 1:
        raise UsageError("--nodes, --gpus-per-node and --max-ranks must be at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores
    from megatron_ledom.cluster.check_layout import check_layout, format_agreement

    flags = [*(["--preset", args.preset] if args.preset else []), *flags]
    world_size = args.nodes * args.gpus_per_node
    agreement = check_layout(flags, world_size, max_ranks=args.max_ranks, timeout_s=args.timeout)
    print(format_agreement(agreement))
    return 1 if agreement.faults else 0


if __name__ == "__main__":  # the checkpoint writer starts processes that import this file
    run_cli(main)
