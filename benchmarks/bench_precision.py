"""Claim: trained for 500 steps, each FP8 recipe ends within 0.02 nats of BF16 on the same data.

    python benchmarks/bench_precision.py --folder runs/precision [--steps 500] [--seeds 1 2]
        --output benchmarks/results/precision.json --plot docs/precision.png

Trains the preset `tiny` with tools/pretrain.py, one rank, at 8 x 128 tokens a step (the preset has 16 x 256: this is
for time), once in FP32, BF16 and every FP8 recipe, emulated, for each seed. Runs of one seed read the same samples in
the same order from the same weights, so that their gap is the precision's. A finished run is not made again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from measuring import run_measured, say, write_record

MAX_GAP = 0.02
LAST_STEPS = 50
SHAPE = {"sequence": 128, "batch": 8, "code_files": 500, "vocabulary": 2048}
RUNS: dict[str, list[str]] = {
    "bf16": ["--precision", "bf16"],
    "fp8-delayed": ["--precision", "fp8-delayed"],
    "fp8-tensorwise": ["--precision", "fp8-tensorwise", "--no-first-last-layers-bf16"],
    "fp8-blockwise": ["--precision", "fp8-blockwise"],
    "fp32": [],
}
COLOURS = ("#2c5f8a", "#c0392b", "#d68910", "#1e8449", "0.55")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser


def make_data(folder: Path) -> list[object]:
    """Preprocess the language reference and code of the standard library; return the flags that name them."""
    from megatron_ledom.testing import code_documents, english_documents, run_tool, train_bpe_tokenizer, write_jsonl

    texts = english_documents() + code_documents(SHAPE["code_files"])
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder / "tokenizer"]
    prefix = folder / "reverse_text_document"
    if not prefix.with_suffix(".idx").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        corpus = write_jsonl(folder / "corpus.jsonl", texts)
        train_bpe_tokenizer(texts, SHAPE["vocabulary"], folder / "tokenizer")
        output = ["--output-prefix", folder / "reverse", "--append-eod", "--overwrite"]
        done = run_tool("preprocess_data.py", "--input", corpus, *output, *tokenizer)
        if done.returncode:
            raise SystemExit(done.stderr)
    return ["--data-path", prefix, *tokenizer]


def train(run: Path, seed: int, steps: int, flags: list[object]) -> float:
    """Train one run to its end; returns the CPU seconds that it took, 0 where it was there already."""
    from megatron_ledom.testing import tool_environment, torchrun_command
    from megatron_ledom.train.metrics import VALIDATION_LOSS, read_scalars

    if run.is_dir() and steps in read_scalars(run, VALIDATION_LOSS):
        return 0.0
    shape = ["--seq-length", SHAPE["sequence"], "--max-position-embeddings", SHAPE["sequence"]]
    shape += ["--micro-batch-size", SHAPE["batch"], "--global-batch-size", SHAPE["batch"]]
    length = ["--train-iters", steps, "--save-interval", steps, "--eval-interval", steps, "--eval-iters", 64]
    arguments = ["--preset", "tiny", "--device", "cpu", "--run-dir", run, "--seed", seed, *shape, *length, *flags]
    return run_measured(torchrun_command("pretrain.py", 1, arguments), tool_environment()).cpu_s


def read_run(run: Path, steps: int) -> dict[str, Any]:
    """The losses of a finished run: at its end, and the training curve in means of ten steps."""
    from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars

    curve = list(read_scalars(run, TRAIN_LOSS).values())
    assert len(curve) == steps, f"{run} has {len(curve)} steps"
    return {
        "validation_loss": round(read_scalars(run, VALIDATION_LOSS)[steps], 4),
        "train_loss": round(statistics.fmean(curve[-LAST_STEPS:]), 4),
        "curve": [round(statistics.fmean(curve[i : i + 10]), 4) for i in range(0, steps, 10)],
    }


def compare(found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Gaps to BF16, seed by seed: of the validation loss, and of the training loss of the last steps."""
    gaps = {}
    for name, by_seed in found.items():
        pairs = [(by_seed[seed], found["bf16"][seed]) for seed in by_seed]
        gaps[name] = {
            key: [round(mine[key] - bf16[key], 4) for mine, bf16 in pairs] for key in ("validation_loss", "train_loss")
        }
    return gaps


def draw(found: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draw the losses, and their gap to BF16, over the steps; a line a recipe, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6.5), dpi=130, layout="constrained", sharex=True)
    for (name, by_seed), colour in zip(found.items(), COLOURS, strict=True):
        curves = [by_seed[seed]["curve"] for seed in by_seed]
        bf16 = [found["bf16"][seed]["curve"] for seed in by_seed]
        steps = [10 * i + 5 for i in range(len(curves[0]))]
        top.plot(steps, [statistics.fmean(values) for values in zip(*curves, strict=True)], color=colour, label=name)
        if name == "bf16":
            continue
        for number, (curve, reference) in enumerate(zip(curves, bf16, strict=True)):
            gap = [mine - other for mine, other in zip(curve, reference, strict=True)]
            bottom.plot(steps, gap, color=colour, linewidth=1, linestyle=("-", "--", ":")[number % 3])
    top.set(ylabel="training loss, nats a token", title="tiny, 500 steps, FP8 recipes emulated on the CPU")
    top.legend(frameon=False, fontsize=8)
    bottom.axhline(0, color="0.4", linewidth=0.8)
    bottom.set(xlabel="step", ylabel="gap to BF16, nats", title="each line a seed: solid the first, dashed the second")
    for axes in (top, bottom):
        axes.grid(color="0.92")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Train what is missing, compare, write."""
    arguments = build_parser().parse_args()
    load = os.getloadavg()[0]
    data = make_data(arguments.folder)
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in RUNS}
    for name, flags in RUNS.items():
        for seed in arguments.seeds:
            run = arguments.folder / f"{name}-{seed}"
            cpu_s = train(run, seed, arguments.steps, [*data, *flags])
            found[name][seed] = read_run(run, arguments.steps)
            say(f"{name}, seed {seed}: {found[name][seed]['validation_loss']} after {cpu_s:.0f} CPU s")
    gaps = compare(found)
    recipes = [name for name in RUNS if name.startswith("fp8")]
    worst = max(abs(gap) for name in recipes for gap in gaps[name]["validation_loss"])
    claim = f"after {arguments.steps} steps every FP8 recipe is within {MAX_GAP} nats of BF16"
    if arguments.plot:
        draw(found, arguments.plot)
    command = " ".join(["python", "benchmarks/bench_precision.py", *sys.argv[1:]])
    results = {"worst_gap": worst, "shape": SHAPE, "seeds": arguments.seeds, "gaps_to_bf16": gaps, "runs": found}
    write_record(arguments.output, claim, worst <= MAX_GAP, command, load, **results)
    for name, gap in gaps.items():
        print(f"{name:15s} validation {gap['validation_loss']} training {gap['train_loss']}")


if __name__ == "__main__":
    main()
