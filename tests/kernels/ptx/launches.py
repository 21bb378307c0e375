"""Our kernels in the interpreter: nvcc's PTX of the `.cu` files, started as the product's own launchers say.

The launchers are compiled by g++ with a recorder in place of the grid (`recorded_launches.cpp`): kernels, grids, sizes
and parameters are theirs, and nothing is copied here.

Legend: B batch, S sequence, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from emulation import (
    FLAGS,
    AttentionParams,
    RopeParams,
    attention_params,
    kernel_sources,
    rope_params,
    run_command,
    set_tensors,
)
from nvcc import compile_cuda

from megatron_ledom.ops.conformance import Rotation
from megatron_ledom.ops.mask import AttentionMask
from ptx.machine import MAX_STEPS, Launch, TensorMap, run_launch
from ptx.memory import GlobalMemory
from ptx.program import Module, parse

MAP_BYTES, NUM_MAPS = 128, 4  # of CUtensorMap; of ForwardSm90aParams
RECORDER = Path(__file__).parent / "recorded_launches.cpp"


def ptx_of(source: Path, folder: Path) -> str:
    """What nvcc writes for a `.cu` file, with the lines that it comes from."""
    made = folder / f"{source.stem}.ptx"
    architecture = "90a" if "sm90a" in source.stem else "80"
    compile_cuda(source, made, "-ptx", f"-arch=compute_{architecture}", "-lineinfo")
    return made.read_text(encoding="utf-8")


class EmulatedMap(ctypes.Structure):
    """A tensor map as the emulation has it; it takes as much room as CUDA's."""

    _fields_ = [("data", ctypes.c_uint64), ("sizes", ctypes.c_int64 * 4), ("strides", ctypes.c_int64 * 4),
                ("box", ctypes.c_int32 * 2)]  # fmt: skip


def maps_of(kernel: str, params: bytes) -> dict[int, TensorMap]:
    """The tensor maps at the beginning of a kernel's parameters: offset -> map."""
    found = {}
    for offset in range(0, MAP_BYTES * NUM_MAPS, MAP_BYTES) if "sm90a" in kernel else ():
        said = EmulatedMap.from_buffer_copy(params, offset)
        found[offset] = TensorMap(said.data, tuple(said.sizes), tuple(said.strides), (*said.box, 1, 1))
    return found


@dataclass
class Launcher:
    """The product's launchers; they say what they would start."""

    library: ctypes.CDLL

    def launches(self, function: str, params: ctypes.Structure, modules: Sequence[Module]) -> list[Launch]:
        """What a function of the C interface would start.

        Raises:
            ValueError: it refused its arguments, or wants to start a kernel of another module.
        """
        self.library.recorded_clear()
        for kernel in (k for module in modules for k in module.kernels.values()):
            self.library.recorded_expect(kernel.name.encode(), sum(size for _, size in kernel.params))
        status = getattr(self.library, function)(ctypes.byref(params))
        if status:
            raise ValueError(f"{function} returns {status}")
        return [self._launch(i) for i in range(self.library.recorded_count())]

    def _launch(self, number: int) -> Launch:
        sizes = (ctypes.c_uint * 6)()
        self.library.recorded_sizes(number, sizes)
        x, y, z, threads, shared_bytes, num_bytes = sizes
        data = ctypes.string_at(self.library.recorded_params(number), num_bytes)
        kernel = self.library.recorded_kernel(number).decode()
        return Launch(kernel, (x, y, z), threads, shared_bytes, [data], maps_of(kernel, data))


def build_launcher(folder: Path, sources: Sequence[Path]) -> Launcher:
    """Compile the launchers of `.cu` files. The bodies of the kernels are there too, but nothing calls them."""
    library = folder / "librecorded.so"
    run_command(["g++", *FLAGS, "-shared", "-x", "c++", *map(str, sources), str(RECORDER), "-o", str(library)])
    # ctypes itself resolves all symbols at once, and those of the kernels' bodies are not there.
    system = ctypes.CDLL(None)
    system.dlopen.restype = ctypes.c_void_p
    handle = system.dlopen(str(library).encode(), ctypes.c_int(os.RTLD_LAZY))
    assert handle, library
    loaded = ctypes.CDLL(str(library), handle=handle)
    loaded.recorded_kernel.restype = ctypes.c_char_p
    loaded.recorded_params.restype = ctypes.c_void_p
    return Launcher(loaded)


@dataclass
class Interpreter:
    """Our kernels as the emulation offers them, but from their PTX."""

    launcher: Launcher
    modules: list[Module]
    instructions: int = field(default=0)  # run so far, each for many threads
    max_steps: int = MAX_STEPS
    left_out: str = "(none)"  # a part of the names of kernels that are not run
    started: set[str] = field(default_factory=set)  # names of kernels

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: AttentionMask,
        function: str = "ledom_attention_forward_cuda",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [B, S, H, D] and the rows' logarithms [B, H, S]."""
        o = torch.full_like(q, math.nan)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
        self._call(function, mask, {"q": q, "k": k, "v": v}, {"o": o, "lse": lse})
        return o, lse

    def backward(
        self,
        inputs: Sequence[torch.Tensor],
        mask: AttentionMask,
        results: Sequence[torch.Tensor],
        d_o: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of q, k and v; `results` are what `forward` gave for them."""
        (q, k, v), (o, lse) = inputs, results
        gradients = {f"d_{name}": torch.full_like(x, math.nan) for name, x in zip("qkv", inputs, strict=True)}
        given = {"q": q, "k": k, "v": v, "o": o, "d_o": d_o, "lse": lse}
        made = {**gradients, "delta": torch.full_like(lse, math.nan)}
        self._call("ledom_attention_backward_cuda", mask, given, made)
        return tuple(gradients.values())

    def _call(
        self, function: str, mask: AttentionMask, given: dict[str, torch.Tensor], made: dict[str, torch.Tensor]
    ) -> None:
        params = attention_params(given["q"], given["k"], mask)
        tensors = {**given, **made}
        rows = {name: tensors.pop(name) for name in ("lse", "delta") if name in tensors}
        set_tensors(params, **tensors)
        for name, row in rows.items():
            setattr(params, name, row.data_ptr())
        self._run(function, params, given, made)

    def rope(self, x: torch.Tensor, y: torch.Tensor, rotation: Rotation) -> None:
        """Write `x` turned into `y`, which may be `x`."""
        given = {"cosines": rotation.cosines, "sines": rotation.sines}
        if x.data_ptr() != y.data_ptr():
            given["x"] = x
        self._run("ledom_rope_cuda", rope_params(x, y, rotation), given, {"y": y})

    def _run(
        self,
        function: str,
        params: AttentionParams | RopeParams,
        given: dict[str, torch.Tensor],
        made: dict[str, torch.Tensor],
    ) -> None:
        memory = GlobalMemory()
        for name, tensor in {**given, **made}.items():
            add_tensor(memory, name, tensor, name in made)
        for name in ("doc_first", "doc_last"):
            if address := getattr(params, name):
                data = (ctypes.c_uint8 * (4 * params.batch * params.seq)).from_address(address)
                memory.add(name, address, np.ctypeslib.as_array(data), False)
        for launch in self.launcher.launches(function, params, self.modules):
            if self.left_out in launch.kernel:
                continue
            module = next(m for m in self.modules if launch.kernel in m.kernels)
            self.started.add(launch.kernel)
            self.instructions += run_launch(module, launch, memory, self.max_steps)


def add_tensor(memory: GlobalMemory, name: str, tensor: torch.Tensor, is_writable: bool) -> None:
    """The whole storage of a tensor, so that a view of a larger one is served."""
    storage = tensor.untyped_storage()
    data = np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))
    memory.add(name, storage.data_ptr(), data, is_writable)


def build_interpreter(texts: Sequence[str], folder: Path) -> Interpreter:
    """The interpreter of PTX modules, and the launchers of all kernels of the product."""
    return Interpreter(build_launcher(folder, kernel_sources()), [parse(x) for x in texts])
