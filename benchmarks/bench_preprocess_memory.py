"""Claim: memory does not grow with the corpus: flat during 10^7 documents, as much as for 10^6, under 1 GiB.

Corpora of short documents of real words are written, preprocessed by the tool in a process of its
own, and verified by tools/check_data.py. Memory is the sum of the resident sets of the process tree, sampled
twenty times a second; pages that a fork shares count in each process, so the figure is too high, not too low.
Less than 10^6 documents need less, because they do not fill a worker's buffers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from measuring import run_measured, say, write_record

from megatron_ledom.testing import REPOSITORY, english_documents, tool_environment

LIMIT_BYTES = 1 << 30
ALLOWED_GROWTH = 1.15  # largest corpus against the next, and the end of its run against the second tenth


def write_corpus(path: Path, num_documents: int, seed: int) -> Path:
    """Write short documents: 3 to 12 words of the language reference, in a seeded order."""
    rng = random.Random(seed)
    words = " ".join(english_documents()).replace('"', "").replace("\\", "").split()
    block = []
    for _ in range(10_000):
        start = rng.randrange(len(words) - 12)
        block.append('{"text": ' + json.dumps(" ".join(words[start : start + rng.randint(3, 12)])) + "}\n")
    with path.open("w", encoding="utf-8") as file:
        for begun in range(0, num_documents, len(block)):
            rng.shuffle(block)
            file.writelines(block[: num_documents - begun])
    return path


def run_sampled(tool: str, *arguments: object) -> dict[str, Any]:
    """Run a tool; return its time and the memory of its process tree."""
    run = run_measured([sys.executable, str(REPOSITORY / "tools" / tool), *map(str, arguments)], tool_environment())
    samples = run.tree_bytes
    tenths = [round(max(samples[len(samples) * i // 10 :][: max(1, len(samples) // 10)]) / 2**20) for i in range(10)]
    return {"wall_s": round(run.wall_s, 1), "peak_mb": round(max(samples) / 2**20), "curve_mb": tenths}


def main() -> int:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpora and output; 4 GB for 10^7")
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--tokenizer-model", default=str(REPOSITORY / "tests" / "assets" / "tokenizer"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    args.work.mkdir(parents=True, exist_ok=True)
    results = {}
    for count in args.documents:
        corpus = write_corpus(args.work / f"{count}.jsonl", count, seed=count)
        prefix = args.work / f"out{count}"
        fixed = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", args.tokenizer_model]
        made = run_sampled(
            "preprocess_data.py",
            *("--input", corpus, "--output-prefix", prefix, "--append-eod", "--overwrite", "--workers", args.workers),
            *fixed,
        )
        checked = run_sampled("check_data.py", f"{prefix}_text_document")
        results[str(count)] = {"corpus_mb": round(corpus.stat().st_size / 1e6, 1), "preprocess": made, "check": checked}
        say(f"{count:>10,} documents: {made} check {checked}")
        for path in [corpus, *args.work.glob(f"out{count}_*")]:
            path.unlink()
    peaks = [r["preprocess"]["peak_mb"] for r in results.values()]
    curve = list(results.values())[-1]["preprocess"]["curve_mb"]
    is_flat = max(curve[2:]) <= ALLOWED_GROWTH * curve[1] and peaks[-1] <= ALLOWED_GROWTH * peaks[-2 % len(peaks)]
    holds = max(peaks) << 20 < LIMIT_BYTES and is_flat
    command = f"python benchmarks/bench_preprocess_memory.py --documents {' '.join(map(str, args.documents))}"
    write_record(
        args.output,
        (__doc__ or "").splitlines()[0].removeprefix("Claim: "),
        holds,
        command,
        load,
        workers=args.workers,
        documents=results,
    )
    say(f"the claim {'holds' if holds else 'DOES NOT HOLD'}: peaks of {peaks} MB")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
