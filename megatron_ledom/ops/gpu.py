"""What a GPU is: the facts that a verification of kernels depends on."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch


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


def driver_version() -> str:
    """The version of NVIDIA's driver, "580.159.04"; "unknown" where its library cannot be asked."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))):
        return "unknown"
    library.nvmlShutdown()
    return text.value.decode()
