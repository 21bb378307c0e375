"""What a GPU is: the facts that a verification of kernels depends on."""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ledom.ops.kernels import load_kernels

MANAGEMENT_LIBRARY = "libnvidia-ml.so.1"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU and its driver.

    Attributes:
        name: as CUDA gives it.
        capability: 10 * major + minor.
        driver: the driver's version, or the CUDA version that it serves where it does not say.
    """

    name: str
    capability: int
    driver: str


@functools.cache
def find_gpu(index: int) -> Gpu:
    """Return the facts of the GPU that torch numbers `index`."""
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), 10 * major + minor, driver_version())


def driver_version(library: str = MANAGEMENT_LIBRARY, kernel_module: Path = KERNEL_MODULE) -> str:
    """The version of NVIDIA's driver, of the first of three that says it.

    Containers may lack the management library although CUDA works in them. The driver must not be "unknown" there: the
    record of a verification would outlive every change of it.

    Args:
        library: NVIDIA's management library.
        kernel_module: what the driver's kernel module says of itself.

    Returns:
        "580.159.04", of the library or the module; "serves CUDA 13.0" where only the driver itself can be asked;
        "unknown" without a driver, or without an extension that could ask it (which then has no kernels to verify).
    """
    return _ask_library(library) or _read_module(kernel_module) or _served_version() or "unknown"


def _ask_library(name: str) -> str | None:
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    if library.nvmlInit_v2():
        return None
    text = ctypes.create_string_buffer(96)
    has_failed = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
    library.nvmlShutdown()
    return None if has_failed else text.value.decode()


def _read_module(path: Path) -> str | None:
    """Of a line such as "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue ..."."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.M)
    return found[1] if found else None


def _served_version() -> str | None:
    extension = load_kernels()
    _, served = (0, 0) if isinstance(extension, str) else extension.cuda_versions()
    return f"serves CUDA {served // 1000}.{served % 1000 // 10}" if served else None
