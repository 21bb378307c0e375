#!/usr/bin/env python3
"""Train a LEDOM model: a torchrun target over Megatron's `pretrain()`; README.md shows a whole command."""

from __future__ import annotations

import sys

from megatron_ledom.errors import run_cli


def main(argv: list[str]) -> int:
    """Answer `--help` without importing torch, else train."""
    if {"-h", "--help"} & set(argv):
        from megatron_ledom.engine.arguments import build_front_parser

        build_front_parser().print_help()
        return 0
    from megatron_ledom.train.lifecycle import StopRequest

    stop = StopRequest()
    stop.watch()  # before any import that starts threads
    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_ledom.train.pretrain import main as train

    return record(train)(argv, stop)  # torchrun then names the error of the rank that failed first


if __name__ == "__main__":  # the checkpoint writer starts processes that import this file
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_cli(main)
