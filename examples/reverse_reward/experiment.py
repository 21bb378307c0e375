#!/usr/bin/env python3
"""Does Reverse Reward choose better answers? The paper's claim, tested with twins that this machine can train.

Forward and reverse twins of two million parameters read the same word problems with worked solutions. The
forward twin answers unseen ones N times, and every way of choosing among the N is measured. Each
finished step is kept: run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from settings import Settings

from megatron_ledom.errors import UsageError, run_cli
from megatron_ledom.log import format_seconds
from megatron_ledom.testing import REPOSITORY, tool_environment


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; without flags it is the experiment that docs/reverse_reward.md reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        *("--output", "-o"),
        type=Path,
        default=REPOSITORY / "runs/reverse_reward",
        help="everything is kept in here (default: runs/reverse_reward)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of initial weights, order and samples")
    parser.add_argument(
        "--jobs",
        type=int,
        choices=[1, 2],
        default=min(2, len(os.sched_getaffinity(0))),
        help="cores to use: 2 trains the twins at the same time (default: %(default)s)",
    )
    for field in fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        default = field.default
        parser.add_argument(flag, type=type(default), default=default, metavar="N", help=f"(default: {default})")
    return parser


def open_folder(folder: Path, settings: Settings) -> None:
    """Make the folder, or check that it was made with the same settings.

    Raises:
        UsageError: it holds an experiment with other settings.
    """
    record = folder / "settings.json"
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        other = [name for name, value in asdict(settings).items() if found.get(name) != value]
        if other:
            raise UsageError(
                f"{record} has other settings ({', '.join(other)}). Give the same flags, or another --output"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Run what is not done yet and print the table."""
    args = build_parser().parse_args(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    folder = args.output.resolve()
    open_folder(folder, settings)
    sys.path.append(str(REPOSITORY / "examples/quickstart"))
    from plan import Experiment
    from runner import Runner

    started = time.monotonic()
    runner = Runner(folder, environment=tool_environment())
    runner.run_plan(Experiment(folder, settings, args.seeds, runner, args.jobs).plan())
    print(f"{format_seconds(time.monotonic() - started)}, peak memory {runner.peak_memory_bytes / 2**30:.1f} GiB")
    return 0


if __name__ == "__main__":
    run_cli(main)
