"""Claim: whole runs have 0.6 of bare gigatoken's speed, 0.9 of bare `tokenizers`', 3 x the best peer's (small: 10 x).

The first from 300 MB on (what is smaller gigatoken alone has done before any program has started), small: to 100 MB.

Whole run: start of Python, loading, checking the library against the reference, reading, tokenising, reversing,
hashing, writing, joining, forced to disk. Bare: the library alone, in this way the limit: gigatoken reads and parses
the JSONL by itself with all threads and keeps the ids in memory; `tokenizers` gets texts that are in memory
(encode_batch_fast, all threads). Neither writes, and what they import and load is not counted.

The contestants run in turn, several times, so that what else the machine does meets all of them. Beside the wall time
stands the CPU time, which other jobs change less. Peers are measured where they are given, as whole runs too:
--megatron-lm names a checkout, --datatrove the interpreter of an environment that holds datatrove. They do not reverse.

A corpus is made of a folder of text files, deduplicated (--text-folder), for instance of unpacked Debian packages
(linux-doc-6.1, python3.11-doc, perl-doc and parts of linux-source-6.1 make more than 300 MB).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Run, run_measured, say, spread, write_record

from megatron_ledom.testing import REPOSITORY

AIMS = {"gigatoken": 0.6, "tokenizers": 0.9}
MAX_TREE_BYTES = 2**30
FAST_PEER = "Megatron-LM preprocess_data_fast.py"
SMALL_CORPUS_MB, LARGE_CORPUS_MB = 100, 300


def aim_against_fast_peer(corpus_mb: float) -> float:
    """How many times faster than the fast peer a whole run should be: its start alone takes seconds."""
    return 10.0 if corpus_mb < SMALL_CORPUS_MB else 3.0


DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    folder, name, output, tokenizer, eos, workers = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, glob_pattern=name),
            DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=eos, shuffle_documents=False),
        ],
        tasks=int(workers), workers=int(workers), logging_dir=output + "-logs", skip_completed=False,
    ).run()
"""
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


def plain_environment(path: Path, **extra: str) -> dict[str, str]:
    """A user's environment: what the tests' has besides (no dynamo, one thread) shortens the start of some contestants.

    Args:
        path: whose modules are imported.
        extra: for this contestant.
    """
    return {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1", **extra}


def clear(args: argparse.Namespace, name: str) -> None:
    """Remove what a run before wrote, so that none has to replace it."""
    for path in args.work.glob(f"{name}_*"):
        path.unlink()


def run_ours(args: argparse.Namespace, flags: list[str], backend: str) -> Run:
    """Run our tool from start to end."""
    clear(args, "ours")
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", str(args.corpus)]
    command += ["--output-prefix", str(args.work / "ours"), "--append-eod", *flags]
    command += ["--workers", str(args.workers), "--tokenizer-backend", backend]
    return run_measured(command, plain_environment(REPOSITORY))


def run_bare(args: argparse.Namespace, library: str) -> dict[str, float]:
    """Run a library alone, on as many threads as we have workers; return its own times."""
    environment = plain_environment(
        REPOSITORY, RAYON_NUM_THREADS=str(args.workers), TOKENIZERS_PARALLELISM="true", OPENBLAS_NUM_THREADS="1"
    )
    files = {"vocab_file": args.vocab_file, "merge_file": args.merge_file, "model": args.tokenizer_model}
    given = json.dumps({name: value for name, value in files.items() if value is not None})
    command = [sys.executable, "-c", BARE[library], args.tokenizer_type, given, str(args.corpus)]
    return json.loads(run_measured(command, environment).stdout.splitlines()[-1])


def run_megatron(args: argparse.Namespace, flags: list[str], tool: str) -> Run:
    """Run one of Megatron-LM's own tools."""
    clear(args, "theirs")
    command = [sys.executable, str(args.megatron_lm / "tools" / tool), "--input", str(args.corpus)]
    command += ["--output-prefix", str(args.work / "theirs"), "--append-eod", *flags]
    command += ["--use-gigatoken"] if "fast" in tool else ["--workers", str(args.workers)]
    return run_measured(command, plain_environment(args.megatron_lm))


def has_same_documents(ours: Path, theirs: Path) -> bool:
    """Whether our file holds the documents of Megatron's, reversed, closed by the same id; numpy alone reads both."""
    files = []
    for prefix in (ours, theirs):
        index = Path(f"{prefix}.idx").read_bytes()
        count = int.from_bytes(index[18:26], "little")
        kind = {8: np.uint16, 4: np.int32}[index[17]]
        files.append((np.fromfile(f"{prefix}.bin", kind), np.frombuffer(index, np.int32, count, 34)))
    (found, lengths), (natural, their_lengths) = files
    if not np.array_equal(lengths, their_lengths):
        return False
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    return all(
        np.array_equal(found[a : b - 1], natural[a : b - 1][::-1]) and found[b - 1] == natural[b - 1]
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    )


def run_datatrove(args: argparse.Namespace) -> Run:
    """Run datatrove's tokeniser over the corpus in as many parts as there are workers: it shares out whole files."""
    parts, output = args.work / "parts", args.work / "datatrove"
    if not parts.is_dir():
        parts.mkdir()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((parts / f"{i}.jsonl").open("wb")) for i in range(args.workers)]
            with args.corpus.open("rb") as corpus:
                for number, line in enumerate(corpus):
                    files[number % args.workers].write(line)
    for folder in (output, Path(f"{output}-logs")):
        shutil.rmtree(folder, ignore_errors=True)
    script = args.work / "run_datatrove.py"  # its workers import it
    script.write_text(DATATROVE, encoding="utf-8")
    tokenizer = Path(args.tokenizer_model) / "tokenizer.json"
    words = [parts, "*.jsonl", output, tokenizer, "<|endoftext|>", args.workers]
    return run_measured([str(args.datatrove), str(script), *map(str, words)], plain_environment(args.work))


def tokenizer_flags(args: argparse.Namespace) -> list[str]:
    """The flags of the tools that name the tokenizer."""
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    return [w for n in names if getattr(args, n) for w in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]


def summary(text_mb: float, num_tokens: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Spread of what was measured, and the rates."""
    found = {name: spread([run[name] for run in runs]) for name in runs[0]}
    rates = [text_mb / run["wall_s"] for run in runs]
    tokens = [num_tokens / 1e6 / run["wall_s"] for run in runs]
    return found | {"mb_per_s": spread(rates, 1), "million_tokens_per_s": spread(tokens, 2)}


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
    tools = ["preprocess_data.py", "preprocess_data_fast.py"]
    parser.add_argument("--megatron-tools", nargs="+", choices=tools, default=tools, help="which of them (both)")
    parser.add_argument("--datatrove", type=Path, help="the Python of an environment with datatrove")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # no contestant is to compile its modules again at every start
    load = os.getloadavg()[0]
    args.work.mkdir(parents=True, exist_ok=True)
    if args.text_folder is not None:
        make_corpus(args.text_folder, args.corpus, int(args.corpus_mb * 1e6))
    text_mb, flags = args.corpus.stat().st_size / 1e6, tokenizer_flags(args)
    times: dict[str, list[dict[str, float]]] = {}

    def note(name: str, run: Run | dict[str, float]) -> None:
        peak = {} if isinstance(run, dict) else {"tree_mb": max(run.tree_bytes) / 2**20}
        found = run if isinstance(run, dict) else {"wall_s": run.wall_s, "cpu_s": run.cpu_s} | peak
        times.setdefault(name, []).append(found)
        rate = text_mb / found["wall_s"]
        say(f"{name:<28} {found['wall_s']:6.2f} s wall, {found['cpu_s']:6.2f} s CPU, {rate:6.1f} MB/s")

    for _ in range(args.repeats):
        for library in args.libraries:
            note(f"bare {library}", run_bare(args, library))
            note(f"ours with {library}", run_ours(args, flags, library))
        for tool in args.megatron_tools if args.megatron_lm else ():
            note(f"Megatron-LM {tool}", run_megatron(args, flags, tool))
        if args.datatrove:
            note("datatrove", run_datatrove(args))
    theirs = args.work / "theirs_text_document"
    manifest = json.loads((args.work / "ours_text_document.manifest.json").read_text(encoding="utf-8"))
    num_tokens = manifest["counts"]["tokens"]
    table = {name: summary(text_mb, num_tokens, runs) for name, runs in times.items()}
    ratios = {}
    for library in args.libraries:
        bare, ours = table[f"bare {library}"], table[f"ours with {library}"]
        ratios[library] = {
            measure: round(bare[measure]["median"] / ours[measure]["median"], 3) for measure in ("wall_s", "cpu_s")
        }
    judged = [library for library in ratios if library != "gigatoken" or text_mb >= LARGE_CORPUS_MB]
    holds = all(ratios[library]["wall_s"] >= AIMS[library] for library in judged)
    say(f"share of the bare library's speed: {ratios}; aims {AIMS}: {'met' if holds else 'NOT MET'}")
    ours = [f"ours with {library}" for library in args.libraries]
    speedups = {
        name: {peer: round(table[peer]["wall_s"]["median"] / table[name]["wall_s"]["median"], 1) for peer in peers}
        for name in ours
        if (peers := [peer for peer in table if not peer.startswith(("bare", "ours"))])
    }
    for name, found in speedups.items():
        say(f"{name} is faster by: {found}")
    if "ours with gigatoken" in speedups and FAST_PEER in table:
        holds &= speedups["ours with gigatoken"][FAST_PEER] >= aim_against_fast_peer(text_mb)
    is_same = has_same_documents(args.work / "ours_text_document", theirs) if args.megatron_lm else None
    say(f"the same documents as Megatron-LM's tool writes, reversed: {is_same}")
    holds &= is_same is not False
    holds &= all(table[name]["tree_mb"]["max"] * 2**20 < MAX_TREE_BYTES for name in ours)
    command = f"python benchmarks/bench_preprocess.py --libraries {' '.join(args.libraries)} --repeats {args.repeats}"
    results = {"corpus_mb": round(text_mb, 1), "tokens": num_tokens, "workers": args.workers}
    results |= {"tokenizer": args.tokenizer_type, "share_of_bare": ratios, "times_faster_than": speedups}
    results |= {"same_documents_as_megatron_lm": is_same}
    claim = (__doc__ or "").splitlines()[0].removeprefix("Claim: ")
    write_record(args.output, claim, holds, command, load, **results, times=table)
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
