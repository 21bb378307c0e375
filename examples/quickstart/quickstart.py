#!/usr/bin/env python3
"""The whole line on real text, on this machine: corpus, reverse model and forward twin, conversion, use.

`make quickstart` runs it. It starts the project's tools as you would by hand, prints each
command before it runs, and ends with a table of what was made, where, and how long it took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from runner import Finished, Runner
from steps import Quickstart, Settings

from megatron_ledom.errors import InputError, UsageError, run_cli
from megatron_ledom.log import format_seconds
from megatron_ledom.testing import REPOSITORY, tool_environment


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; without flags it is the run that README.md describes."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        *("--output", "-o"),
        type=Path,
        default=REPOSITORY / "runs/quickstart",
        help="each run makes a folder of its own in here (default: runs/quickstart)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the newest run, after its last finished step")
    parser.add_argument("--corpus", default="", metavar="JSONL", help='your own text, one {"text": ...} object a line')
    for name, meaning in (
        ("vocab-size", "entries of the tokenizer"),
        ("first-iters", "iterations before the layout changes"),
        ("train-iters", "iterations in all"),
        ("num-texts", "famous lines to write something before, 3 at most"),
        ("num-questions", "passages to rerank"),
        ("num-candidates", "continuations for each of them"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    return parser


def open_folder(output: Path, settings: Settings, *, is_resumed: bool) -> tuple[Path, Settings]:
    """Return the folder of a new run and its settings, or those of the newest one to go on with.

    Raises:
        InputError: there is no run to go on with.
    """
    runs = sorted(folder for folder in output.glob("run-*") if (folder / "settings.json").is_file())
    if is_resumed:
        if not runs:
            raise InputError(f"--resume: no run in {output}; start one without --resume")
        return runs[-1], Settings(**json.loads((runs[-1] / "settings.json").read_text(encoding="utf-8")))
    folder = output / f"run-{int(runs[-1].name.removeprefix('run-')) + 1 if runs else 1:03d}"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    return folder, settings


def format_summary(finished: Sequence[Finished], total_s: float, peak_memory_bytes: int, folder: Path) -> str:
    """Return the closing table as Markdown."""
    width = max(len(f.title) for f in finished)
    lines = [f"| {'step':<{width}} | {'time':>12} | result", f"|{'-' * (width + 2)}|{'-' * 13}:|-------"]
    lines += [f"| {f.title:<{width}} | {format_seconds(f.seconds):>12} | {f.result}" for f in finished]
    memory = f"{peak_memory_bytes / 2**30:.1f} GiB"
    return "\n".join(
        [*lines, "", f"{format_seconds(total_s)} in all, peak memory of all processes {memory}, in {folder}"]
    )


def main(argv: list[str]) -> int:
    """Run the plan and print the table."""
    args = build_parser().parse_args(argv)
    fields = {name: value for name, value in vars(args).items() if name not in {"output", "resume"}}
    settings = Settings(**fields)
    if not 0 < settings.first_iters < settings.train_iters:
        raise UsageError(
            f"--first-iters {settings.first_iters} must lie between 0 and --train-iters {settings.train_iters}"
        )
    started = time.monotonic()
    folder, settings = open_folder(args.output.resolve(), settings, is_resumed=args.resume)
    print(f"quickstart in {folder}", flush=True)
    runner = Runner(folder, environment=tool_environment())
    finished = runner.run_plan(Quickstart(folder, settings, runner, REPOSITORY / ".cache/quickstart").plan())
    summary = format_summary(finished, time.monotonic() - started, runner.peak_memory_bytes, folder)
    (folder / "SUMMARY.md").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}\nnow look at {folder / 'loss_curves.png'} and {folder / 'written.txt'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
