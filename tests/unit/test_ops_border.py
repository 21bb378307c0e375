"""What the kernels' face refuses or leaves to torch before an address leaves Python, and what it finds out."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.ops import gpu
from megatron_ledom.ops import kernels as kernels_module
from megatron_ledom.ops.attention import attention
from megatron_ledom.ops.conformance import masks, random_problem
from megatron_ledom.ops.cross_entropy import logit_gradient_, logit_statistics
from megatron_ledom.ops.gpu import driver_version
from megatron_ledom.ops.kernels import FUNCTIONS, cpu_paths, kernels, load_kernels
from megatron_ledom.ops.launch import run_poisoned
from megatron_ledom.ops.mask import Documents, documents_from_lengths, natural_order_mask
from megatron_ledom.ops.path import LEAST_SCALE, MAX_GRID_Y
from megatron_ledom.ops.reference import rope_tables
from megatron_ledom.ops.rope import rope
from megatron_ledom.ops.trust import Use, self_check
from megatron_ledom.ops.verification import ROPE
from megatron_ledom.testing import REPOSITORY

CPU = torch.device("cpu")
REVERSED = natural_order_mask(Direction.REVERSE)


@pytest.fixture
def bf16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("bf16_by_default")
def test_what_kernels_write_in_fp32_is_fp32_whatever_the_default() -> None:
    problem = random_problem(masks(1, 5)["reversed"], 1, 5, 2, 1, 64)
    _, lse, *_ = run_poisoned(problem, cpu_paths()[0])
    assert lse.dtype == torch.float32
    for use in (Use(cpu_paths()[0], torch.bfloat16, 64, "documents"), Use(ROPE, torch.bfloat16)):
        assert self_check(use, CPU) is None


def test_rope_refuses_memory_that_is_not_what_it_reads() -> None:
    x, (cosines, sines) = torch.randn(1, 8, 2, 4), rope_tables(torch.tensor([1.0, 0.1]), 8)
    documents = documents_from_lengths(torch.tensor([0, 3, 8]), 1, 8)
    for path in ("auto", "torch"):
        with pytest.raises(UsageError, match=r"torch\.bfloat16 and torch\.float32: give float32"):
            rope(x, cosines.bfloat16(), sines, from_end=True, path=path)
        with pytest.raises(UsageError, match=r"document bounds are torch\.int64 \[1, 8\]"):
            rope(
                x, cosines, sines, from_end=True, documents=Documents(documents.first.long(), documents.last), path=path
            )
        with pytest.raises(UsageError, match=r"int32 \[1, 5\], not int32 \[B, S\] = \[1, 8\]"):
            short = Documents(documents.first[:, :5], documents.last[:, :5])
            rope(x, cosines, sines, from_end=True, documents=short, path=path)
        with pytest.raises(UsageError, match="bounds are on meta, the other tensors on cpu"):
            away = Documents(documents.first.to("meta"), documents.last.to("meta"))
            rope(x, cosines, sines, from_end=True, documents=away, path=path)
    with pytest.raises(UsageError, match="do not fit 8 tokens"):
        rope(x, cosines[:, 0], sines[:, 0], from_end=True)


def test_the_loss_refuses_memory_that_is_not_what_it_reads() -> None:
    logits, targets, one = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    for path in ("auto", "torch"):
        for bad, said in (
            (one[:2], r"torch\.float32 \[2\]"),
            (one.bfloat16(), r"torch\.bfloat16 \[3\]"),
            (one.to("meta"), "on meta"),
        ):
            with pytest.raises(UsageError, match="lse_N is .*" + said):
                logit_gradient_(logits, targets, bad, one, 0, path)
            with pytest.raises(UsageError, match="d_loss_N is .*" + said):
                logit_gradient_(logits, targets, one, bad, 0, path)
        with pytest.raises(UsageError, match="targets are on meta, logits on cpu"):
            logit_statistics(logits, targets.to("meta"), 0, path)


@pytest.mark.parametrize(("batch", "seq"), [(0, 5), (2, 0), (0, 0)])
def test_auto_leaves_what_is_empty_to_torch(batch: int, seq: int) -> None:
    documents = Documents(*(torch.zeros(batch, seq, dtype=torch.int32) for _ in range(2)))
    q, k = (torch.randn(batch, seq, h, 16, requires_grad=True) for h in (4, 2))
    for found in (None, documents):
        output = attention(q, k, k, natural_order_mask(Direction.REVERSE, documents=found))
        turned = rope(q, *rope_tables(torch.tensor([1.0, 0.1]), 6), from_end=True, documents=found)
        assert output.shape == turned.shape == q.shape
        assert [x.shape for x in torch.autograd.grad((output + turned).sum(), (q, k))] == [q.shape, k.shape]
    with pytest.raises(UsageError, match=r"'portable' cannot serve this call: .* is empty"):
        attention(q, k, k, REVERSED, path="portable")
    with pytest.raises(UsageError, match=r"'portable' cannot serve this call: .* is empty"):
        rope(q, *rope_tables(torch.tensor([1.0]), 6), from_end=True, path="portable")


def test_auto_turns_nothing_by_tables_without_columns() -> None:
    x = torch.randn(1, 3, 2, 4)
    assert torch.equal(rope(x, *rope_tables(torch.empty(0), 3), from_end=True), x)


@pytest.mark.parametrize(
    ("batch", "heads", "scale", "said"),
    [
        (MAX_GRID_Y + 1, 1, 1.0, "at most 65,535 batch rows and heads"),
        (1, MAX_GRID_Y + 1, 1.0, "at most 65,535 batch rows and heads"),
        (1, 1, 0.0, "positive scale"),
        (1, 1, -1.0, "positive scale"),
        (1, 1, float("nan"), "positive scale"),
        (1, 1, LEAST_SCALE, "positive scale"),
    ],
)
def test_auto_leaves_what_cuda_kernels_refuse_to_torch(batch: int, heads: int, scale: float, said: str) -> None:
    """Without a GPU: fake tensors of one; that it is torch's is decided before one is asked."""
    with FakeTensorMode():
        q = torch.empty(batch, 2, heads, 64, device="cuda", dtype=torch.bfloat16)
        assert attention(q, q, q, REVERSED, scale=scale).shape == q.shape
        with pytest.raises(UsageError, match=f"'sm80' cannot serve this call: .*{said}"):
            attention(q, q, q, REVERSED, scale=scale, path="sm80")
        if batch > 1:
            tables = [torch.empty(2, 32, device="cuda", dtype=torch.float32) for _ in range(2)]
            assert rope(q, *tables, from_end=True).shape == q.shape


def test_the_limit_of_a_grid_is_the_launchers() -> None:
    text = (REPOSITORY / "csrc/reversed_attention/cuda/launch.h").read_text(encoding="utf-8")
    assert re.findall(r"kMaxGridY = (\d+);", text) == [str(MAX_GRID_Y)]
    assert torch.tensor(LEAST_SCALE, dtype=torch.float32) == 0 < torch.tensor(LEAST_SCALE * 1.001, dtype=torch.float32)


def test_the_drivers_version_is_found_without_its_management_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "version"
    for line, version in (
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (me@here)  Tue", "580.159.04"),
        ("NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVIDIA UNIX aarch64 Kernel Module  550.54  Sat Aug 19 01:15:15 UTC 2023", "550.54"),
    ):
        module.write_text(f"NVRM version: {line}\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
        assert driver_version("libabsent.so.1", module) == version
    module.write_text("GCC version:  gcc version 12.2.0\n")
    for place in (module, tmp_path / "absent"):
        for served, said in ((13020, "serves CUDA 13.2"), (0, "unknown")):
            extension = types.SimpleNamespace(cuda_versions=lambda served=served: [13000, served])
            monkeypatch.setattr(gpu, "load_kernels", lambda extension=extension: extension)
            assert driver_version("libabsent.so.1", place) == said
        monkeypatch.setattr(gpu, "load_kernels", lambda: "there is none")
        assert driver_version("libabsent.so.1", place) == "unknown"


def test_an_extension_without_a_function_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels()
    older = types.ModuleType("megatron_ledom.ops._kernels")
    for name in (name for name in dir(whole) if name != "swiglu_forward_cpu"):
        setattr(older, name, getattr(whole, name))
    monkeypatch.setitem(kernels_module.importlib.sys.modules, "megatron_ledom.ops._kernels", older)
    found = load_kernels.__wrapped__()
    assert isinstance(found, str) and "has no swiglu_forward_cpu: build it with `python setup.py" in found
    older.swiglu_forward_cpu = whole.swiglu_forward_cpu
    assert load_kernels.__wrapped__() is older


def test_every_function_that_is_called_is_asked_for() -> None:
    called = set()
    for path in sorted((REPOSITORY / "megatron_ledom").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("kernels()", "extension", "module"):
                called.add(node.attr)
    every = {name for name in dir(kernels()) if not name.startswith("_")}
    assert {"rope", "swiglu_forward_cpu"} <= called & every <= set(FUNCTIONS) <= every
