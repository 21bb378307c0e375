"""Claim: preprocessing, whole runs, reaches 0.6 of bare gigatoken and 0.9 of bare `tokenizers` on the same cores.

Whole run: start of Python, loading, checking the library against the reference, reading, tokenising, reversing,
hashing, writing, joining, forced to disk. Bare: the library alone, in this way the limit: gigatoken reads and parses
the JSONL by itself with all threads and keeps the ids in memory; `tokenizers` gets texts that are in memory
(encode_batch_fast, all threads). Neither writes, and what they import and load is not counted.

The contestants run in turn, several times, so that what else the machine does meets all of them. Beside the wall time
stands the CPU time, which other jobs change less. Peers are measured where their checkout is given (--megatron-lm).

A corpus is made of a folder of text files, deduplicated (--text-folder), for instance of unpacked Debian packages
(linux-doc-6.1, python3.11-doc, perl-doc and parts of linux-source-6.1 make more than 300 MB).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from measuring import Run, run_measured, say, spread, write_record

from megatron_ledom.testing import REPOSITORY, tool_environment

AIMS = {"gigatoken": 0.6, "tokenizers": 0.9}
SUFFIXES = {".txt", ".rst", ".pod", ".py", ".c", ".h", ".md"}

BARE = {
    "gigatoken": """
import json, resource, sys, time
from gigatoken.gigatoken_rs import JsonlFileSource, load_hf_json
from megatron_ledom.data.tokenizers import load_tokenizer
import awkward
kind, files, corpus = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
tokenizer = load_hf_json(load_tokenizer(kind, **files).content())
cpu, start = time.process_time(), time.perf_counter()
ids = tokenizer.encode_files(JsonlFileSource([corpus]), parallel=True)
print(json.dumps({"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}))
""",
    "tokenizers": """
import json, sys, time
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.data.sources import read_documents
from pathlib import Path
kind, files, corpus = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
backend = load_tokenizer(kind, **files)._backend
texts = [document.texts[0] for document in read_documents([Path(corpus)])]
wall = used = 0.0
for start in range(0, len(texts), 4000):  # as many at a time as fit in memory
    cpu, begun = time.process_time(), time.perf_counter()
    backend.encode_batch_fast(texts[start : start + 4000], add_special_tokens=False)
    wall, used = wall + time.perf_counter() - begun, used + time.process_time() - cpu
print(json.dumps({"wall_s": wall, "cpu_s": used}))
""",
}


def make_corpus(folder: Path, path: Path, limit_bytes: int) -> Path:
    """Write the text files below a folder as JSONL, each once, in a seeded order."""
    rng, seen, size = random.Random(0), set(), 0
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and {p.suffix, Path(p.stem).suffix} & SUFFIXES]
    rng.shuffle(found)
    with path.open("w", encoding="utf-8") as file:
        for source in found:
            data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
            digest = hashlib.sha256(data).digest()
            if data.strip() and digest not in seen:
                seen.add(digest)
                size += file.write(json.dumps({"text": data.decode("utf-8", "replace")}, ensure_ascii=False) + "\n")
            if size >= limit_bytes:
                break
    return path


def run_ours(args: argparse.Namespace, flags: list[str], backend: str) -> Run:
    """Run our tool from start to end."""
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", str(args.corpus)]
    command += ["--output-prefix", str(args.work / "ours"), "--append-eod", "--overwrite", *flags]
    command += ["--workers", str(args.workers), "--tokenizer-backend", backend]
    return run_measured(command, tool_environment())


def run_bare(args: argparse.Namespace, library: str) -> dict[str, float]:
    """Run a library alone, on as many threads as we have workers; return its own times."""
    environment = tool_environment({"RAYON_NUM_THREADS": str(args.workers), "TOKENIZERS_PARALLELISM": "true"})
    files = {"vocab_file": args.vocab_file, "merge_file": args.merge_file, "model": args.tokenizer_model}
    given = json.dumps({name: value for name, value in files.items() if value is not None})
    command = [sys.executable, "-c", BARE[library], args.tokenizer_type, given, str(args.corpus)]
    return json.loads(run_measured(command, environment).stdout.splitlines()[-1])


def run_megatron(args: argparse.Namespace, flags: list[str], tool: str) -> Run:
    """Run one of Megatron-LM's own tools."""
    command = [sys.executable, str(args.megatron_lm / "tools" / tool), "--input", str(args.corpus)]
    command += ["--output-prefix", str(args.work / "theirs"), "--append-eod", *flags, "--workers", str(args.workers)]
    command += ["--use-gigatoken"] if "fast" in tool else []
    environment = tool_environment({"PYTHONPATH": str(args.megatron_lm)})
    return run_measured(command, environment)


def tokenizer_flags(args: argparse.Namespace) -> list[str]:
    """The flags of the tools that name the tokenizer."""
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    return [w for n in names if getattr(args, n) for w in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]


def summary(text_mb: float, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Spread of what was measured, and the rates."""
    found = {name: spread([run[name] for run in runs]) for name in runs[0]}
    return found | {"mb_per_s": spread([text_mb / run["wall_s"] for run in runs], 1)}


def main() -> int:
    """Run the contestants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL; written if --text-folder is given")
    parser.add_argument("--text-folder", type=Path, help="make the corpus of the text files in here")
    parser.add_argument("--corpus-mb", type=float, default=350, help="size of the corpus that is made (350)")
    parser.add_argument("--libraries", nargs="+", choices=sorted(BARE), default=sorted(BARE))
    for name in ("type", "model"):
        parser.add_argument(f"--tokenizer-{name}")
    parser.add_argument("--vocab-file")
    parser.add_argument("--merge-file")
    parser.add_argument("--work", type=Path, required=True, help="folder for output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megatron-lm", type=Path, help="a checkout, whose tools are run too")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    args.work.mkdir(parents=True, exist_ok=True)
    if args.text_folder is not None:
        make_corpus(args.text_folder, args.corpus, int(args.corpus_mb * 1e6))
    text_mb, flags = args.corpus.stat().st_size / 1e6, tokenizer_flags(args)
    times: dict[str, list[dict[str, float]]] = {}

    def note(name: str, run: Run | dict[str, float]) -> None:
        found = run if isinstance(run, dict) else {"wall_s": run.wall_s, "cpu_s": run.cpu_s}
        times.setdefault(name, []).append(found)
        rate = text_mb / found["wall_s"]
        say(f"{name:<28} {found['wall_s']:6.2f} s wall, {found['cpu_s']:6.2f} s CPU, {rate:6.1f} MB/s")

    for _ in range(args.repeats):
        for library in args.libraries:
            note(f"bare {library}", run_bare(args, library))
            note(f"ours with {library}", run_ours(args, flags, library))
        for tool in ("preprocess_data.py", "preprocess_data_fast.py") if args.megatron_lm else ():
            note(f"Megatron-LM {tool}", run_megatron(args, flags, tool))
    table = {name: summary(text_mb, runs) for name, runs in times.items()}
    ratios = {}
    for library in args.libraries:
        bare, ours = table[f"bare {library}"], table[f"ours with {library}"]
        ratios[library] = {
            measure: round(bare[measure]["median"] / ours[measure]["median"], 3) for measure in ("wall_s", "cpu_s")
        }
    holds = all(ratio["wall_s"] >= AIMS[library] for library, ratio in ratios.items())
    say(f"share of the bare library's speed: {ratios}; aims {AIMS}: {'met' if holds else 'NOT MET'}")
    command = f"python benchmarks/bench_preprocess.py --libraries {' '.join(args.libraries)} --repeats {args.repeats}"
    results = {"corpus_mb": round(text_mb, 1), "workers": args.workers, "tokenizer": args.tokenizer_type}
    write_record(args.output, __doc__ or "", holds, command, load, share=ratios, **results, times=table)
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
