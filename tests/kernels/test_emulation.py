"""The emulation itself: what it says about kernels with a known fault."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from emulation import Emulation, build_library

SOURCE = Path(__file__).parent / "faulty_kernels.cu"
FAULTS = {
    1: r"deadlock: 63 threads \(the first is 0\) wait in __syncthreads at faulty_kernels\.cu:\d+; 1 threads have ended",
    2: r"divergent barrier: this thread comes to __syncthreads at faulty_kernels\.cu:\d+, 32 others wait in",
    3: r"divergent warp: this thread comes to __shfl_xor_sync at device\.h:\d+, 16 of its warp wait in __syncwarp at",
    4: r"copy_async_16 at .*faulty_kernels\.cu:\d+: shared address 8 is not a multiple of 16",
    5: r"copy_async_16 at .*: shared address 1024 lies outside the block's 1024 bytes",
    6: r"copy_async_16 at .*: global address 0x[0-9a-f]+ is not a multiple of 16",
    7: r"load_matrices at .*: shared address 1024 lies outside the block's 1024 bytes \[block \d, 0, 0, thread 1\]",
    8: r"the thread ends while 1 of its copies are under way",
    9: r"__shfl_xor_sync at .*: not all lanes take part",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return build_library(tmp_path_factory.mktemp("faulty"), [SOURCE])


def message(faulty: Emulation, fault: int) -> str:
    data = torch.zeros(1024, dtype=torch.bfloat16)
    faulty.library.ledom_emulation_configure(0, 1, ctypes.c_uint64(1), 1, None, 0)
    status = faulty.library.run_faulty(ctypes.c_void_p(data.data_ptr()), fault)
    text: str = faulty.library.ledom_emulation_error().decode()
    assert (status != 0) == bool(text)
    return text


def test_a_kernel_without_fault_runs(faulty: Emulation) -> None:
    assert message(faulty, 0) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_place(faulty: Emulation, fault: int) -> None:
    text = message(faulty, fault)
    assert re.search(FAULTS[fault], text), text
    assert message(faulty, 0) == ""  # an error ends with its launch
