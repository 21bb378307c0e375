#!/usr/bin/env python3
r"""Claim: questions given answers are scored at 3 times a plain loop's speed, 1.5 times padded batches', flat memory.

Each way runs in a process of its own, in turn, on the same pairs (answers of 20 to 600 tokens, questions of 30 to 90,
all different, real text), the same model and the same threads:

    ours      ReverseLM.score, or ForwardLM.score
    loop      transformers' model on one pair at a time, log_softmax of all its logits
    padded    the same on batches of 8 pairs in the order of the file, padded on the right, with an attention mask

Workloads: `reverse` scores each question given its answer; `forward` 8 answers given each question; `options` 4
answers of 1 to 8 tokens given each prompt of 300, as few-shot tasks do, where the prompt is read once.
Two models: the folder of --model (SmolLM2-135M's is made by tests/real_model.py; its ids run backwards for `reverse`,
which costs the same), and a random network of the tiny preset's shape with that folder's tokenizer. The scores of all
ways are compared. Wall time and CPU time are given; where others use the machine, CPU time says more. Memory: growth
of the peak while scoring, for vocabularies and lengths of a factor of nine.

    OMP_NUM_THREADS=1 python benchmarks/bench_scoring.py --model smollm2/ --work /scratch \
        --output benchmarks/results/scoring.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from measuring import run_measured, say, spread, write_record

from megatron_ledom.errors import run_cli
from megatron_ledom.testing import english_documents, tool_environment

LEAST = {"loop": 3.0, "padded": 1.5}
WAYS, WORKLOADS = ("ours", "loop", "padded"), ("reverse", "forward", "options")
PADDED_BATCH, CANDIDATES = 8, 8
VOCABULARIES, LENGTHS = (16_384, 49_152, 147_456), (64, 576)
MEMORY_PAIRS = 4


def main(argv: list[str]) -> int:
    """Measure, print, write; or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a Llama with its tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for the small models; made if absent")
    parser.add_argument("--pairs", type=int, default=48, help="of the named model (default: %(default)s)")
    parser.add_argument("--small-pairs", type=int, default=192, help="of the small one (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="(default: all)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory")
    parser.add_argument("--output", type=Path, help="JSON file of results to write")
    parser.add_argument("--child", nargs=4, metavar=("WAY", "WORKLOAD", "PAIRS", "ANSWERS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.model, *args.child)))
        return 0
    load_before = os.getloadavg()[0]
    small = write_small_model(args.model, args.work / "small", 0)
    speed = {}
    for name, folder, num_pairs in (("small", small, args.small_pairs), ("named", args.model, args.pairs)):
        for workload in args.workloads:
            speed[f"{name} {workload}"] = compare(folder, workload, num_pairs, args.repeats, args.work)
    memory = [] if args.no_memory else compare_memory(args.model, args.work)
    holds = all(each["cpu_ratio"][way]["median"] >= least for each in speed.values() for way, least in LEAST.items())
    command = "benchmarks/bench_scoring.py " + " ".join(argv)
    write_record(
        args.output, __doc__.partition("\n")[0], holds, command, load_before, threads=os.environ.get("OMP_NUM_THREADS"),
        speed=speed, memory=memory,
    )  # fmt: skip
    say(f"the claim {'holds' if holds else 'does not hold'} for every model and workload")
    return 0


def run_child(folder: Path, way: str, workload: str, num_pairs: int, answers: str, work: Path) -> dict[str, Any]:
    """Run one way in a process of its own and return what it says of itself."""
    command = [sys.executable, __file__, "--model", str(folder), "--work", str(work)]
    env = {k: v for k, v in tool_environment().items() if k != "OMP_NUM_THREADS"}
    env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    run = run_measured([*command, "--child", way, workload, str(num_pairs), answers], env)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found | {"peak_rss_bytes": run.peak_rss_bytes}


def compare(folder: Path, workload: str, num_pairs: int, repeats: int, work: Path) -> dict[str, Any]:
    """Run the three ways in turn; return their figures and ratios to ours, per round."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(repeats):
        for way in WAYS:
            runs[way].append(run_child(folder, way, workload, num_pairs, "20-600", work))
    expected = runs["loop"][0]["scores"]
    worst = max(
        abs(a / b - 1) for way in WAYS for run in runs[way] for a, b in zip(run["scores"], expected, strict=True)
    )
    assert worst < 1e-5, f"{workload}: scores differ by {worst:.1e} of their size"
    result: dict[str, Any] = {"pairs": num_pairs, "tokens": runs["ours"][0]["tokens"], "largest_difference": worst}
    for way in WAYS:
        result[way] = {
            "pairs_per_s": spread([num_pairs / run["wall_s"] for run in runs[way]]),
            "pairs_per_cpu_s": spread([num_pairs / run["cpu_s"] for run in runs[way]]),
            "peak_rss_mb": round(max(run["peak_rss_bytes"] for run in runs[way]) / 1e6),
        }
    for kind in ("wall", "cpu"):
        result[f"{kind}_ratio"] = {
            way: spread(
                [run[f"{kind}_s"] / ours[f"{kind}_s"] for run, ours in zip(runs[way], runs["ours"], strict=True)]
            )
            for way in LEAST
        }
    say(f"{folder.name} {workload}: {json.dumps({k: v for k, v in result.items() if k not in WAYS})}")
    for way in WAYS:
        say(f"    {way}: {json.dumps(result[way])}")
    return result


def compare_memory(tokenizer: Path, work: Path) -> list[dict[str, Any]]:
    """Growth of the peak while pairs of one length are scored, for every vocabulary and length."""
    rows = []
    for vocab_size in VOCABULARIES:
        folder = write_small_model(tokenizer, work / f"vocabulary-{vocab_size}", vocab_size)
        for length in LENGTHS:
            row: dict[str, Any] = {"vocabulary": vocab_size, "answer_tokens": length}
            for way in ("ours", "loop"):
                found = run_child(folder, way, "reverse", MEMORY_PAIRS, f"{length}-{length}", work)
                row[f"{way}_mb"] = round(found["growth_bytes"] / 1e6)
            rows.append(row)
            say(f"memory: {json.dumps(row)}")
    return rows


def write_small_model(source: Path, folder: Path, vocab_size: int) -> Path:
    """Write a random Llama of the tiny preset's shape with the tokenizer, and its vocabulary unless one is given."""
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from megatron_ledom.engine.presets import get_preset

    settings = get_preset("tiny").settings
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["ffn_hidden_size"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=settings["num_attention_heads"],
        num_key_value_heads=settings["num_query_groups"],
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    LlamaForCausalLM(config).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def build_layouts(lm: Any, workload: str, num_pairs: int, shortest: int, longest: int) -> list[Any]:
    """Cut questions and answers out of real text: one question an answer, or one for `CANDIDATES` answers."""
    from megatron_ledom.direction import condition

    generator = random.Random(0)
    limit = lm.model.config.vocab_size
    ids = [i % limit for text in english_documents()[:24] for i in lm.encode(text)]

    def piece(length: int) -> list[int]:
        start = generator.randrange(len(ids) - length)
        return ids[start : start + length]

    step = (longest - shortest) / max(1, num_pairs - 1)
    lengths = [round(shortest + n * step) for n in range(num_pairs)]
    generator.shuffle(lengths)
    layouts, question = [], piece(60)
    if workload == "options":
        prompts = [piece(300) for _ in range(-(-num_pairs // 4))]
        options = [(piece(1 + number * 7 // num_pairs), prompts[number // 4]) for number in range(num_pairs)]
        return [condition(*texts, lm.direction, boundary_id=lm.boundary_id) for texts in options]
    for number, length in enumerate(lengths):
        if workload == "reverse" or number % CANDIDATES == 0:
            question = piece(generator.randint(30, 90))
        texts = (question, piece(length)) if workload == "reverse" else (piece(length), question)
        layouts.append(condition(*texts, lm.direction, boundary_id=lm.boundary_id))
    return layouts


def measure(folder: Path, way: str, workload: str, num_pairs: str, answers: str) -> dict[str, Any]:
    """Score the pairs one way in this process; returns times, scores and the growth of the peak memory."""
    from megatron_ledom.inference import ForwardLM, ReverseLM

    if workload == "reverse":
        lm: Any = ReverseLM.load(folder, device="cpu", assume_direction="reverse")
    else:
        lm = ForwardLM.load(folder, device="cpu")
    if way != "ours":  # as a user of transformers has it, without our kernels
        from transformers import AutoModelForCausalLM

        lm.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    shortest, longest = map(int, answers.split("-"))
    layouts = build_layouts(lm, workload, int(num_pairs), shortest, longest)
    WAY_FUNCTIONS[way](lm, layouts[:1])  # what is done once in a process
    before_bytes = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    scores = WAY_FUNCTIONS[way](lm, layouts)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "growth_bytes": peak_bytes() - before_bytes,
        "tokens": sum(len(layout.ids) for layout in layouts),
        "scores": scores,
    }


def reset_peak() -> int:
    """Let the kernel count the peak anew from what is held now, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The largest resident set since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def score_ours(lm: Any, layouts: list[Any]) -> list[float]:
    """The library."""
    return [score.logprob for score in lm.score(layouts)]


def score_loop(lm: Any, layouts: list[Any]) -> list[float]:
    """One pair at a time."""
    import torch

    scores = []
    with torch.inference_mode():
        for layout in layouts:
            ids = torch.tensor([layout.ids])
            logprobs = lm.model(input_ids=ids).logits.float().log_softmax(-1)
            picked = logprobs[0, :-1].gather(-1, ids[0, 1:, None])[layout.target_start - 1 :, 0]
            scores.append(float(picked.double().sum()))
    return scores


def score_padded(lm: Any, layouts: list[Any]) -> list[float]:
    """Batches in the order of the file."""
    import torch

    scores = []
    with torch.inference_mode():
        for start in range(0, len(layouts), PADDED_BATCH):
            batch = layouts[start : start + PADDED_BATCH]
            ids = torch.zeros(len(batch), max(len(layout.ids) for layout in batch), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, layout in enumerate(batch):
                ids[row, : len(layout.ids)] = torch.tensor(layout.ids)
                mask[row, : len(layout.ids)] = 1
            logprobs = lm.model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
            picked = logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            for row, layout in enumerate(batch):
                scores.append(float(picked[row, layout.target_start - 1 : len(layout.ids) - 1].double().sum()))
    return scores


WAY_FUNCTIONS = {"ours": score_ours, "loop": score_loop, "padded": score_padded}

if __name__ == "__main__":
    run_cli(main)
