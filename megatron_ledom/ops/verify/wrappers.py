"""What each inline-assembly function of the CUDA kernels does on a GPU, beside what the emulation takes it to do.

`csrc/tests/wrappers.cu` calls every function of `csrc/reversed_attention/cuda/device.h` once. It is compiled here, by
nvcc and by g++ with `csrc/emulation/`, from a checkout. Where both agree, what the emulation shows in the tests is true
of the GPU as far as these functions go.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parents[3] / "csrc"
SOURCE = CSRC / "tests/wrappers.cu"
MACHINERY = ("fiber", "grid", "warp", "entry")
WORDS = 32
NUM_SEEDS = 8
SECTIONS = (
    *("cp.async 16", "cp.async 4", "ldmatrix", "ldmatrix.trans", "st.shared", "cvt.rn.bf16x2", "bf16 to fp32"),
    *("mma.m16n8k16", "ex2.approx", "ex2 edges", "shfl.xor", "indices"),
)
# What need not agree to the last bit: the order of a product's sums, and the power's own error of 2^-22.
TOLERANCES = {"mma.m16n8k16": 1e-5, "ex2.approx": 2**-21, "shfl.xor": 1e-6}
"""Relative to the largest of a section for the products, to each number for the others."""
ARCHITECTURES = [f"-gencode=arch=compute_{a},code={c}" for a, c in ((80, "sm_80"), (90, "sm_90"), (80, "compute_80"))]


def inputs(seed: int) -> torch.Tensor:
    """The words of all lanes, int32 [32, 32], as `wrappers.cu` reads them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (32, WORDS), generator=generator, dtype=torch.int64).to(torch.int32)
    special = [0x3F808000, 0x3F818000, 0x7FC00001, 0x7F800000, 0x00018000, 0x7F7FFFFF, 0x00000001, 0x3F80FFFF]
    words[0, 6:14] = torch.tensor(special, dtype=torch.int32)
    words[1, 6:14] = torch.tensor(special, dtype=torch.int32) | -(2**31)
    halves = torch.randn(32, 12, generator=generator, device="cpu").to(torch.bfloat16)
    words[:, 14:20] = halves.view(torch.int32)
    words[:, 20:24] = torch.randn(32, 4, generator=generator, device="cpu").view(torch.int32)
    powers = torch.rand(32, 4, generator=generator, device="cpu") * 160 - 140
    words[:, 24:28] = powers.view(torch.int32)
    return words.contiguous()


def build_emulated(folder: Path) -> ctypes.CDLL:
    """Compile the source with the emulation.

    Raises:
        RuntimeError: no sources, or the compiler's own words.
    """
    flags = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    machinery = [str(CSRC / f"emulation/{name}.cpp") for name in MACHINERY]
    library = folder / "libwrappers_emulated.so"
    _run([*flags, "-x", "c++", str(SOURCE), *machinery, "-o", str(library)])
    loaded = ctypes.CDLL(str(library))
    loaded.ledom_emulation_error.restype = ctypes.c_char_p
    return loaded


def build_for_gpu(folder: Path, nvcc: str) -> ctypes.CDLL:
    """Compile the source with nvcc.

    Raises:
        RuntimeError: no sources, or the compiler's own words.
    """
    library = folder / "libwrappers_gpu.so"
    flags = ["-std=c++17", "-O3", *ARCHITECTURES, "-shared", "-Xcompiler=-fPIC", f"-I{CSRC}"]
    _run([nvcc, *flags, str(SOURCE), "-o", str(library)])
    return ctypes.CDLL(str(library))


def _run(command: list[str]) -> None:
    if not SOURCE.is_file():
        raise RuntimeError(f"no {SOURCE}: the wrappers are compared in a checkout, not in an installed package")
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"no {command[0]} here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")


def run_emulated(library: ctypes.CDLL, words: torch.Tensor) -> torch.Tensor:
    """The emulation's results, int32 [sections, 32, 4]."""
    out = torch.zeros(len(SECTIONS), 32, 4, dtype=torch.int32)
    assert library.ledom_wrapper_sections() == len(SECTIONS)
    library.ledom_emulation_configure(2, 1, ctypes.c_uint64(1), 1, None, 0)
    status = library.ledom_wrappers(ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(out.data_ptr()), 0, None)
    if status:
        raise RuntimeError(f"the emulation stopped: {library.ledom_emulation_error().decode()}")
    return out


def run_on_gpu(library: ctypes.CDLL, words: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A GPU's results, brought to the CPU."""
    given = words.to(device)
    out = torch.zeros(len(SECTIONS), 32, 4, dtype=torch.int32, device=device)
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (given, out))
    status = library.ledom_wrappers(*pointers, device.index or 0, stream)
    if status:
        raise RuntimeError(f"the wrappers' kernel ended with status {status}")
    return out.cpu()


def differences(ours: torch.Tensor, emulated: torch.Tensor) -> list[str]:
    """What differs, section by section; nothing where all that must agree does."""
    faults = []
    for name, found, expected in zip(SECTIONS, ours, emulated, strict=True):
        if name not in TOLERANCES:
            if num := int((found != expected).sum()):
                first = (found != expected).nonzero()[0].tolist()
                lane, word = first
                texts = (f"{int(x[lane, word]) & 0xFFFFFFFF:08x}" for x in (found, expected))
                faults.append(f"{name}: {num} of {found.numel()} words differ; lane {lane} has {', not '.join(texts)}")
            continue
        a, b = (x.contiguous().view(torch.float32).double() for x in (found, expected))
        scale = b.abs().max() if name == "mma.m16n8k16" else b.abs().clamp(min=1e-30)
        off = float(((a - b).abs() / scale).max())
        if not off <= TOLERANCES[name]:
            faults.append(f"{name}: off by {off:.2e}, allowed are {TOLERANCES[name]:.2e}")
    return faults


def compare(folder: Path, nvcc: str, device: torch.device, seeds: range) -> list[str]:
    """Build both, run both on the same numbers, and say what differs.

    Raises:
        RuntimeError: a compiler or a file is missing, or a kernel fails.
    """
    with ThreadPoolExecutor(2) as pool:
        emulated, on_gpu = pool.submit(build_emulated, folder), pool.submit(build_for_gpu, folder, nvcc)
    faults = []
    for seed in seeds:
        words = inputs(seed)
        expected = run_emulated(emulated.result(), words)
        faults += [f"seed {seed}: {f}" for f in differences(run_on_gpu(on_gpu.result(), words, device), expected)]
    return faults


def main(words: list[str]) -> int:
    """Compare on the current GPU; say what differs."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or "nvcc"
    try:
        faults = compare(Path(words[0]), nvcc, torch.device("cuda", torch.cuda.current_device()), range(NUM_SEEDS))
    except RuntimeError as error:
        faults = [f"not compared: {error}"]
    print("\n".join(faults) or f"agree with the emulation ({len(SECTIONS)} functions, {NUM_SEEDS} sets of numbers)")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
