"""Join the shares that tools/preprocess_data.py --shard-index made (a Slurm array, several nodes) into datasets."""

from __future__ import annotations

import argparse
import os

from megatron_ledom.errors import run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(prog="merge_data.py", description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="the --output-prefix of tools/preprocess_data.py")
    parser.add_argument("--overwrite", action="store_true", help="replace datasets of the same name")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one for each usable core)"
    )
    return parser


def main(argv: list[str]) -> int:
    """Join, then print what was written."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # workers are forked, and only a process of one thread can be
    from megatron_ledom.data.manifest import manifest_path
    from megatron_ledom.data.merge import merge_shards
    from megatron_ledom.data.publishing import dataset_prefixes
    from megatron_ledom.errors import UsageError

    if args.workers < 1:
        raise UsageError(f"--workers must be at least 1, found {args.workers}")
    manifests = merge_shards(args.prefix, workers=args.workers, overwrite=args.overwrite)
    for manifest in manifests:
        (prefix,) = dataset_prefixes(args.prefix, [manifest.json_key])
        counts = manifest.counts
        print(
            f"{manifest_path(prefix)}: {counts.documents:,} documents, {counts.tokens:,} tokens, {manifest.direction}"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
