"""Speeds of this rank and of its connections, to be compared with those of the other nodes.

Nothing here decides what is slow: `findings.compare_with_peers` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ledom.cluster.findings import PAIR, Measurement

SIZES = {
    # device -> edge of the square GEMM, bytes copied, bytes reduced
    "cuda": (8192, 1 << 28, 1 << 28),
    "cpu": (512, 1 << 24, 1 << 22),
}
REPEATS = 5


def measure_alone(node: str, device: str) -> list[Measurement]:
    """Speeds of one rank by itself: a matrix product (bf16 on CUDA, fp32 on the CPU) and copies.

    Args:
        node: this rank's node.
        device: "cuda" (the rank's current device) or "cpu".
    """
    import torch

    edge, num_bytes, _ = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    seconds = _best_seconds(lambda: left @ right, device)
    measured = [Measurement("GEMM", node, 2 * edge**3 / seconds / 1e12, "TFLOP/s")]
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    measured.append(Measurement("memory", node, 2 * num_bytes / seconds / 1e9, "GB/s read and written"))
    if device == "cuda":
        host = torch.ones(num_bytes // 4, pin_memory=True)
        seconds = _best_seconds(lambda: target.copy_(host, non_blocking=True), device)
        measured.append(Measurement("copy from the host", node, num_bytes / seconds / 1e9, "GB/s"))
    return measured


def measure_collectives(nodes: Sequence[str], rank: int, device: str) -> list[Measurement]:
    """All-reduces within each node, between neighbours, and over all: what this rank saw.

    Node i is paired with node i + 1, the last with the first; even i first, so that pairs of one round share
    no node. A slow node is slow in both of its pairs; its partners each have another pair.

    Args:
        nodes: the node of every rank.
        rank: this one's.
        device: "cuda" or "cpu".
    """
    import torch
    import torch.distributed as dist

    num_bytes = SIZES[device][2]
    buffer = torch.ones(num_bytes // 4, device=device)
    names = list(dict.fromkeys(nodes))
    members = [[r for r, n in enumerate(nodes) if n == name] for name in names]
    found = []

    def measure(check: str, ranks: list[int]) -> None:
        """Bus bandwidth as NCCL's own tests count it: 2 (n - 1) / n of the bytes cross each rank's link."""
        # Every rank has to call it, members or not.
        group: Any = dist.new_group(ranks, backend="nccl" if device == "cuda" else "gloo")
        if rank in ranks and len(ranks) > 1:
            seconds = _best_seconds(lambda: dist.all_reduce(buffer, group=group), device)
            speed = 2 * (len(ranks) - 1) / len(ranks) * num_bytes / seconds / 1e9
            found.append(Measurement(check, nodes[rank], speed, "GB/s"))

    for ranks in members:
        measure("all-reduce in a node", ranks)
    dist.barrier()
    count = len(names)
    pairs = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    for parity in (0, 1):
        for first, second in pairs:
            if first % 2 == parity:
                measure(PAIR, sorted(members[first] + members[second]))
        dist.barrier()
    if count > 1:
        measure("all-reduce over all ranks", list(range(len(nodes))))
    return found


def _best_seconds(call: Callable[[], Any], device: str) -> float:
    """The least of a few times: what the hardware can do, without what disturbed it once."""
    import torch

    def run() -> float:
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run()  # connections are made, kernels loaded
    return max(min(run() for _ in range(REPEATS)), 1e-9)
