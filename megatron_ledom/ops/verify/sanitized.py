"""A process without torch that runs the CUDA kernels once, for compute-sanitizer, which then watches nothing else.

    compute-sanitizer --tool memcheck python -I -S sanitized.py FOLDER_OF_EXTENSION PART HEAD_DIM SEQ [short]

PART is an attention variant or "rope". With "short" the keys lack their last 16 bytes, which memcheck must report.
Memory is the driver's, through ctypes. It prints a line and exits with 0 when
the kernels have ended and every output is a number; 1 otherwise.
"""

from __future__ import annotations

import array
import ctypes
import random
import sys
from typing import Any

HEADS, GROUPS = 2, 1


class Driver:
    """As much of the CUDA driver as is needed: memory on device 0."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver; an error ends the process."""
        if status := getattr(self.library, name)(*arguments):
            sys.exit(f"{name} returns {status}")

    def put(self, data: array.array[Any], missing_bytes: int = 0) -> int:
        """Copy to the GPU; the memory there is exactly as long as the data, less `missing_bytes`."""
        size = len(data) * data.itemsize - missing_bytes
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        source, _ = data.buffer_info()
        self.call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(source), ctypes.c_size_t(size))
        return address.value

    def get(self, address: int, like: array.array[Any]) -> array.array[Any]:
        """Copy back, after all work is done."""
        self.call("cuCtxSynchronize")
        found = array.array(like.typecode, bytes(len(like) * like.itemsize))
        target, size = ctypes.c_void_p(found.buffer_info()[0]), ctypes.c_size_t(len(found) * found.itemsize)
        self.call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), size)
        return found


def numbers(count: int, seed: int) -> array.array[int]:
    """bf16 of about -1 .. 1."""
    draw = random.Random(seed)
    return array.array("H", [0x3E00 + draw.randrange(256) + 0x8000 * draw.randrange(2) for _ in range(count)])


def run_attention(kernels: Any, driver: Driver, part: str, head_dim: int, seq: int, is_short: bool) -> list[str]:
    """Forward and backward of reversed attention over two documents; the names of outputs that hold NaN."""
    first = array.array("i", [0 if i < seq // 3 else seq // 3 for i in range(seq)])
    last = array.array("i", [seq // 3 - 1 if i < seq // 3 else seq - 1 for i in range(seq)])
    call = kernels.Call(
        *(1, [1, seq, HEADS, GROUPS, head_dim], [0, seq], [driver.put(first), driver.put(last)], 0.1, 1, 0, 0)
    )
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS, "o": HEADS, "d_o": HEADS, "d_q": HEADS, "d_k": GROUPS, "d_v": GROUPS}
    outputs = ("o", "d_q", "d_k", "d_v")
    host = {
        name: array.array("H", [0xFFFF] * (seq * h * head_dim)) if name in outputs else numbers(seq * h * head_dim, i)
        for i, (name, h) in enumerate(heads.items())
    }
    at = {name: driver.put(data, 16 if is_short and name == "k" else 0) for name, data in host.items()}
    arguments = {name: [at[name], 0, h * head_dim, head_dim] for name, h in heads.items()}
    rows = array.array("f", [float("nan")] * (HEADS * seq))
    lse, delta = driver.put(rows), driver.put(rows)
    qkvo = [arguments[name] for name in ("q", "k", "v", "o")]
    kernels.attention_forward(call, qkvo, lse, part)
    gradients = [arguments[name] for name in ("d_o", "d_q", "d_k", "d_v")]
    kernels.attention_backward(call, qkvo, lse, gradients, delta, part)
    bad = [n for n in outputs if any(x & 0x7FFF > 0x7F80 for x in driver.get(at[n], host[n]))]
    return bad + [n for n, x in (("lse", lse), ("delta", delta)) if any(v != v for v in driver.get(x, rows))]


def run_rope(kernels: Any, driver: Driver, head_dim: int, seq: int) -> list[str]:
    """Rotary positions of all but four elements of a head."""
    call = kernels.Call(1, [1, seq, HEADS, HEADS, head_dim], [0, 0], [0, 0], 1.0, 1, 0, 0)
    x = numbers(seq * HEADS * head_dim, 1)
    y = array.array("H", [0xFFFF] * len(x))
    rotary = head_dim - 8
    table = driver.put(array.array("f", [0.5] * (seq * rotary // 2)))
    at = driver.put(y)
    strides = [0, HEADS * head_dim, head_dim]
    way = (rotary, False, True, False, [table, table], seq, True)
    kernels.rope(call, [driver.put(x), *strides], [at, *strides], *way)
    return ["y"] if any(v & 0x7FFF > 0x7F80 for v in driver.get(at, y)) else []


def main(words: list[str]) -> int:
    """Run one part."""
    folder, part, head_dim, seq = words[0], words[1], int(words[2]), int(words[3])
    sys.path.insert(0, folder)
    kernels: Any = __import__("_kernels")
    driver = Driver()
    if part == "rope":
        bad = run_rope(kernels, driver, head_dim, seq)
    else:
        bad = run_attention(kernels, driver, part, head_dim, seq, words[4:] == ["short"])
    print(f"{part}, head size {head_dim}, length {seq}: {'NaN in ' + ', '.join(bad) if bad else 'done'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
