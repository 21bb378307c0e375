"""Which device a run uses: CUDA where there is one, otherwise the CPU engine."""

from __future__ import annotations

from typing import Literal

from megatron_ledom.errors import UsageError

Device = Literal["cpu", "cuda"]


def resolve_device(asked: str) -> Device:
    """Turn `--device auto|cpu|cuda` into the device of this process.

    Raises:
        UsageError: CUDA was asked for and torch sees no CUDA device.
    """
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise UsageError(
            "--device cuda: torch sees no CUDA device "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}). "
            "Check the driver with nvidia-smi, or run with --device cpu"
        )
    return "cpu"
