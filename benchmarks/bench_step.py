"""Claim: a training step of Megatron on the CPU with our kernels takes at most 0.8 of transformers' time.

    python benchmarks/bench_step.py [--layer-kernels auto] [--repeats 30] [--output benchmarks/results/step.json]

One process, 2 threads, fp32, one sequence of 2,048 tokens, 8 M parameters. `pretrain()` runs as `tools/pretrain.py`
starts it; whenever it asks for the next forward step, the clock has one whole step of Megatron (forward, backward,
clipping, optimizer, data, log), and one step of `transformers` is taken on the same tokens: LlamaForCausalLM of the
same shape with SDPA, clipping, torch's fused AdamW. So both are timed in turn, by the wall clock and by the CPU time of
all threads, which other jobs on the machine disturb less. A last step is profiled.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from measuring import say, spread, write_record

MAX_RATIO = 0.8
WARM_UP = 3
SHAPE = {"layers": 8, "hidden": 256, "ffn": 896, "heads": 4, "groups": 4, "tokens": 2048, "vocabulary": 1024}
KINDS = {
    # What an operation's name begins with -> what it is part of.
    "matrix products": ("aten::mm", "mkldnn::_linear_pointwise", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": (
        "ledom::attention",
        "GeneratedBackwardFor_ledom_attention",
        "aten::_scaled_dot_product",
        "aten::_softmax",
        "aten::masked_fill",
    ),
    "rotary positions": ("ledom::rope", "GeneratedBackwardFor_ledom_rope"),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach", "aten::linalg_vector_norm"),
    "norms": (
        "ledom::rms_norm",
        "GeneratedBackwardFor_ledom_rms_norm",
        "aten::_fused_rms_norm",
        "aten::rsqrt",
        "aten::pow",
        "aten::mean",
    ),
    "activation": ("ledom::swiglu", "GeneratedBackwardFor_ledom_swiglu", "aten::silu", "aten::sigmoid"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_"),
    "sums and products": ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::sum"),
    "loss": ("ledom::logit", "_CrossEntropy", "aten::exp", "aten::log", "aten::max", "aten::index"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="auto", choices=["auto", "megatron", "ledom"])
    parser.add_argument("--layer-kernels", default="auto", choices=["auto", "megatron", "ledom"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    return parser


def megatron_command(folder: Path, attention: str, layer_kernels: str, steps: int) -> list[str]:
    """The flags of `tools/pretrain.py` for the shape."""
    words = {
        "preset": "tiny",
        "device": "cpu",
        "run-dir": folder / "run",
        "attention": attention,
        "layer-kernels": layer_kernels,
        "num-layers": SHAPE["layers"],
        "hidden-size": SHAPE["hidden"],
        "ffn-hidden-size": SHAPE["ffn"],
        "num-attention-heads": SHAPE["heads"],
        "num-query-groups": SHAPE["groups"],
        "seq-length": SHAPE["tokens"],
        "max-position-embeddings": SHAPE["tokens"],
        "micro-batch-size": 1,
        "global-batch-size": 1,
        "train-iters": steps,
        "log-interval": 1000,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": SHAPE["vocabulary"] - 1,
        "eval-interval": 10**6,
        "eval-iters": 0,
        "save-interval": 10**6,
    }
    return ["--mock-data", *(str(word) for name, value in words.items() for word in (f"--{name}", value))]


class TransformersStep:
    """One step of the rival: the same shape, SDPA, clipping, AdamW."""

    def __init__(self) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=SHAPE["vocabulary"],
            hidden_size=SHAPE["hidden"],
            intermediate_size=SHAPE["ffn"],
            num_hidden_layers=SHAPE["layers"],
            num_attention_heads=SHAPE["heads"],
            num_key_value_heads=SHAPE["groups"],
            max_position_embeddings=SHAPE["tokens"],
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(config).train()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.clip = torch.nn.utils.clip_grad_norm_

    def __call__(self, tokens: Any) -> None:
        """Train on `tokens`, [1, S]."""
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.clip(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Clock:
    """Times whole steps of Megatron between calls of its forward step, and a step of transformers at each call."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rival = TransformersStep()
        self.seconds: dict[str, list[float]] = {"megatron": [], "transformers": []}
        self.cpu_seconds: dict[str, list[float]] = {"megatron": [], "transformers": []}
        self.started: float | None = None
        self.cpu_started = 0.0
        self.calls = 0
        self.profile: Any = None

    def at_forward_step(self, tokens: Any) -> None:
        """A step of Megatron has ended, and the next one begins when this returns."""
        import torch

        now, cpu_now = time.perf_counter(), time.process_time()
        if self.profile is not None and self.calls == WARM_UP + self.repeats + 1:
            self.profile.__exit__(None, None, None)
        is_counted = WARM_UP < self.calls <= WARM_UP + self.repeats
        if is_counted and self.started is not None:
            self.seconds["megatron"].append(now - self.started)
            self.cpu_seconds["megatron"].append(cpu_now - self.cpu_started)
        began, cpu_began = time.perf_counter(), time.process_time()
        self.rival(tokens)
        if is_counted:
            self.seconds["transformers"].append(time.perf_counter() - began)
            self.cpu_seconds["transformers"].append(time.process_time() - cpu_began)
        if self.calls == WARM_UP + self.repeats:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profile.__enter__()
        self.calls += 1
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def shares(self) -> tuple[dict[str, float], list[tuple[str, float]]]:
        """The share of the profiled step's CPU time by kind, and of the twelve longest operations."""
        events = [(e.key, e.self_cpu_time_total) for e in self.profile.key_averages()]
        total = sum(t for _, t in events)
        by_kind: dict[str, float] = defaultdict(float)
        for name, t in events:
            kind = next((k for k, starts in KINDS.items() if name.startswith(starts)), "everything else")
            by_kind[kind] += t / total
        longest = sorted(events, key=lambda event: -event[1])[:12]
        kinds = {k: round(v, 3) for k, v in sorted(by_kind.items(), key=lambda item: -item[1])}
        return kinds, [(n, round(t / total, 3)) for n, t in longest]


def run(arguments: argparse.Namespace) -> Clock:
    """Train with Megatron's `pretrain()`, transformers in between."""
    from megatron_ledom.train import pretrain as story

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(arguments.threads)}
    import torch

    torch.set_num_threads(arguments.threads)
    clock = Clock(arguments.repeats)
    read = story.next_batch

    def next_batch(data_iterator: Any) -> Any:
        batch = read(data_iterator)
        clock.at_forward_step(batch["tokens"])
        return batch

    story.next_batch = next_batch
    try:
        with tempfile.TemporaryDirectory(prefix="bench_step_") as folder:
            steps = WARM_UP + arguments.repeats + 2
            story.main(megatron_command(Path(folder), arguments.attention, arguments.layer_kernels, steps))
    finally:
        story.next_batch = read
    return clock


def main() -> int:
    """Measure; exit status 1 where Megatron's step takes more than the aim."""
    arguments = build_parser().parse_args()
    load_before = os.getloadavg()[0]
    clock = run(arguments)
    import torch

    ours, theirs = clock.seconds["megatron"], clock.seconds["transformers"]
    ratios, cpu_ratios = (
        [our / their for our, their in zip(found["megatron"], found["transformers"], strict=True)]
        for found in (clock.seconds, clock.cpu_seconds)
    )
    kinds, longest = clock.shares()
    ratio = statistics.median(ratios)
    say(f"{clock.rival.num_parameters / 1e6:.2f} M parameters, attention {arguments.attention}")
    say(f"megatron {statistics.median(ours):.3f} s, transformers {statistics.median(theirs):.3f} s, ratio {ratio:.2f}")
    say(f"CPU time of all threads: ratio {statistics.median(cpu_ratios):.2f}")
    say(f"where Megatron's step goes: {kinds}")
    say(f"its longest operations: {longest}")
    write_record(
        arguments.output,
        f"a training step takes at most {MAX_RATIO} of transformers' time",
        ratio <= MAX_RATIO,
        " ".join(["python", *sys.argv]),
        load_before,
        attention=arguments.attention,
        layer_kernels=arguments.layer_kernels,
        threads=arguments.threads,
        torch=torch.__version__,
        shape=SHAPE | {"parameters": clock.rival.num_parameters},
        repeats=len(ours),
        megatron_s=spread(ours, 4),
        transformers_s=spread(theirs, 4),
        ratio=spread(ratios, 3),
        megatron_cpu_s=spread(clock.cpu_seconds["megatron"], 4),
        transformers_cpu_s=spread(clock.cpu_seconds["transformers"], 4),
        cpu_ratio=spread(cpu_ratios, 3),
        share_of_cpu_time=kinds,
        longest_operations=longest,
    )
    return 0 if ratio <= MAX_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
