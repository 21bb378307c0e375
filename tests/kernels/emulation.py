"""The CUDA sources of `csrc/`, compiled for the CPU with the emulation of `csrc/emulation/`, and their calls.

Legend: B batch, S sequence, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import math
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ledom.ops.conformance import Rotation
from megatron_ledom.ops.kernels import ABI_VERSION, as_argument, as_documents
from megatron_ledom.ops.mask import AttentionMask
from megatron_ledom.testing import REPOSITORY

CSRC = REPOSITORY / "csrc"
KERNELS = CSRC / "reversed_attention/cuda"
MACHINERY = ("fiber", "grid", "warp", "boxes", "products", "entry")
FLAGS = ("-std=c++17", "-fPIC", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", f"-I{CSRC}")
CUDA_ERROR = 1000


class Order(enum.IntEnum):
    """Which of the threads that can run goes on."""

    FIRST = 0
    LAST = 1
    RANDOM = 2


class Completion(enum.IntEnum):
    """When the data of an asynchronous copy arrive."""

    EAGER = 0
    LAZY = 1
    RANDOM = 2


class EmulationError(RuntimeError):
    """The emulation stopped a kernel; the text says what it did and where."""


class TensorArgument(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(n, ctypes.c_int64) for n in ("batch", "seq", "head")]


class AttentionParams(ctypes.Structure):
    """`ledom_attention_params`; a wrong copy is refused through `struct_size`."""

    _fields_ = [
        *((n, ctypes.c_uint32) for n in ("struct_size", "version")),
        *((n, ctypes.c_int32) for n in ("dtype", "batch", "seq", "heads", "kv_heads", "head_dim", "left", "right")),
        *((n, ctypes.c_void_p) for n in ("doc_first", "doc_last")),
        ("scale", ctypes.c_float),
        *((n, TensorArgument) for n in ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")),
        *((n, ctypes.c_void_p) for n in ("lse", "delta")),
        *((n, ctypes.c_int32) for n in ("num_threads", "device")),
        ("stream", ctypes.c_void_p),
    ]


class RopeParams(ctypes.Structure):
    """`ledom_rope_params`; a wrong copy is refused through `struct_size`."""

    _fields_ = [
        *((n, ctypes.c_uint32) for n in ("struct_size", "version")),
        *((n, ctypes.c_int32) for n in ("dtype", "batch", "seq", "heads", "head_dim", "rotary_dim", "interleaved")),
        *((n, ctypes.c_int32) for n in ("from_end", "inverse", "num_positions")),
        *((n, ctypes.c_void_p) for n in ("doc_first", "doc_last", "cosines", "sines")),
        *((n, TensorArgument) for n in ("x", "y")),
        *((n, ctypes.c_int32) for n in ("num_threads", "device")),
        ("stream", ctypes.c_void_p),
    ]


class Counts(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_uint64) for n in ("matrix_loads", "bank_conflicts", "products", "copies", "block_barriers")
    ]


@dataclass(frozen=True)
class Run:
    """How a kernel is run."""

    order: Order = Order.FIRST
    completion: Completion = Completion.LAZY
    seed: int = 1
    removed: tuple[str, int] | None = None  # file and line of a synchronisation that does nothing


HEAD_DIMS = (64, 128, 192)
HEADS = ((2, 2), (4, 2), (3, 1))
"""Query and key heads."""
FLOOR = torch.finfo(torch.bfloat16).eps / 2
"""What an error may be beyond twice torch's: one rounding."""
RUNS = [
    Run(order, completion, seed)
    for seed, (order, completion) in enumerate(itertools.product(Order, (Completion.LAZY, Completion.RANDOM)), start=1)
]
"""Orders and completions that take turns over the cases; all of them meet in the test of their agreement."""


def inputs_of(batch: int, seq: int, heads: int, groups: int, head_dim: int) -> list[torch.Tensor]:
    """Random q, k and v in bf16: [B, S, H, D] and twice [B, S, G, D]."""
    return [torch.randn(batch, seq, h, head_dim).to(torch.bfloat16) for h in (heads, groups, groups)]


@dataclass
class Emulation:
    """A compiled library."""

    library: ctypes.CDLL
    counts: Counts = field(default_factory=Counts)
    synchronisations: set[tuple[str, int]] = field(default_factory=set)

    def call(self, function: str, params: ctypes.Structure, run: Run) -> None:
        """Call a function of the C interface.

        Raises:
            EmulationError: the emulation stopped it.
            ValueError: the launcher refused its arguments.
        """
        file, line = run.removed or (None, 0)
        self.library.ledom_emulation_configure(
            int(run.order), int(run.completion), ctypes.c_uint64(run.seed), 2, file and file.encode(), line
        )
        status = getattr(self.library, function)(ctypes.byref(params))
        if status >= CUDA_ERROR:
            raise EmulationError(self.library.ledom_emulation_error().decode())
        if status:
            raise ValueError(f"{function} returns {status}")
        self.library.ledom_emulation_counts(ctypes.byref(self.counts))
        for words in self.library.ledom_emulation_synchronisations().decode().splitlines():
            file, _, number = words.split(" at ")[1].partition(":")
            self.synchronisations.add((file, int(number)))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: AttentionMask,
        run: Run,
        function: str = "ledom_attention_forward_cuda",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [B, S, H, D] and the rows' logarithms [B, H, S]."""
        o = torch.full_like(q, math.nan)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
        params = attention_params(q, k, mask)
        set_tensors(params, q=q, k=k, v=v, o=o)
        params.lse = lse.data_ptr()
        self.call(function, params, run)
        return o, lse

    def backward(
        self,
        inputs: Sequence[torch.Tensor],
        mask: AttentionMask,
        results: Sequence[torch.Tensor],
        d_o: torch.Tensor,
        run: Run,
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of q, k and v; `results` are what `forward` gave for them."""
        (q, k, v), (o, lse) = inputs, results
        gradients = tuple(torch.full_like(x, math.nan) for x in (q, k, v))
        delta = torch.full_like(lse, math.nan)
        params = attention_params(q, k, mask)
        set_tensors(params, q=q, k=k, v=v, o=o, d_o=d_o, **dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True)))
        params.lse, params.delta = lse.data_ptr(), delta.data_ptr()
        self.call("ledom_attention_backward_cuda", params, run)
        return gradients

    def rope(self, x: torch.Tensor, y: torch.Tensor, rotation: Rotation, run: Run) -> None:
        """Write `x` turned into `y`."""
        self.call("ledom_rope_cuda", rope_params(x, y, rotation), run)


def attention_params(q: torch.Tensor, k: torch.Tensor, mask: AttentionMask) -> AttentionParams:
    batch, seq, heads, head_dim = q.shape
    left, right = mask.reach(seq)
    params = AttentionParams(
        struct_size=ctypes.sizeof(AttentionParams), version=ABI_VERSION, dtype=1, batch=batch, seq=seq, heads=heads,
        kv_heads=k.shape[2], head_dim=head_dim, left=left, right=right, scale=1 / math.sqrt(head_dim),
    )  # fmt: skip
    params.doc_first, params.doc_last = (address or None for address in as_documents(mask.documents))
    return params


def rope_params(x: torch.Tensor, y: torch.Tensor, rotation: Rotation) -> RopeParams:
    batch, seq, heads, head_dim = x.shape
    params = RopeParams(
        struct_size=ctypes.sizeof(RopeParams), version=ABI_VERSION, dtype=x.dtype == torch.bfloat16, batch=batch,
        seq=seq, heads=heads, head_dim=head_dim, rotary_dim=2 * rotation.cosines.shape[1],
        interleaved=rotation.interleaved, from_end=rotation.from_end, inverse=rotation.inverse,
        num_positions=len(rotation.cosines), cosines=rotation.cosines.data_ptr(), sines=rotation.sines.data_ptr(),
    )  # fmt: skip
    params.doc_first, params.doc_last = (address or None for address in as_documents(rotation.documents))
    set_tensors(params, x=x, y=y)
    return params


def set_tensors(params: ctypes.Structure, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        setattr(params, name, TensorArgument(*as_argument(tensor)))


def kernel_sources() -> list[Path]:
    """The `.cu` files of the product."""
    found = sorted(KERNELS.glob("*.cu"))
    assert found, KERNELS
    return found


def compile_objects(
    folder: Path, sources: Sequence[Path], kernel_flags: Sequence[str], machinery_flags: Sequence[str] = ()
) -> list[str]:
    """Compile kernels as C++, and the machinery. Only the former may be instrumented by a sanitizer."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        is_machinery = source.parent.name == "emulation"
        flags = ("-O2", *machinery_flags) if is_machinery else kernel_flags
        run_command(["g++", *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", made])
        return made

    machinery = [CSRC / f"emulation/{name}.cpp" for name in MACHINERY]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, [*sources, *machinery]))


def run_command(command: list[str]) -> str:
    """Run it and return what it says; where it fails, the error shows all of that."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def build_library(folder: Path, sources: Sequence[Path]) -> Emulation:
    """Compile `.cu` files with the emulation into a library, and load it."""
    library = folder / "libemulated.so"
    run_command(["g++", "-shared", "-pthread", *compile_objects(folder, sources, ["-O2"]), "-o", str(library)])
    return load_library(library)


def load_library(library: Path) -> Emulation:
    """Load what `build_library` made."""
    loaded = ctypes.CDLL(str(library))
    for name in ("ledom_emulation_error", "ledom_emulation_synchronisations"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return Emulation(loaded)
