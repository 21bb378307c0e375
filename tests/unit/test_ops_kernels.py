"""The extension and its face: the mask in C, the choice of path, refusals, determinism, tracing, and no torch below."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.ops import kernels as kernels_module
from megatron_ledom.ops.attention import attention, attention_backward_op, attention_op, attention_with_lse
from megatron_ledom.ops.kernels import cpu_paths, describe_kernels, kernels
from megatron_ledom.ops.mask import (
    AttentionMask,
    Documents,
    dense_mask,
    documents_from_lengths,
    intervals,
    model_order_mask,
    natural_order_mask,
)
from megatron_ledom.ops.path import PATHS, choose_path
from megatron_ledom.ops.reference import rope_tables
from megatron_ledom.ops.rope import rope, rope_op
from megatron_ledom.testing import REPOSITORY, tool_environment

CPU = torch.device("cpu")
REVERSED = natural_order_mask(Direction.REVERSE)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 40)), *[st.none() | st.integers(0, 45)] * 2, st.data())
def test_the_mask_in_c_is_the_mask_in_python(
    seq: int, cuts: set[int], left: int | None, right: int | None, data: st.DataObject
) -> None:
    bounds = sorted(c for c in cuts if c <= seq)
    documents = documents_from_lengths(torch.tensor(bounds), 1, seq) if len(bounds) > 1 else None
    mask = AttentionMask(left, right, documents)
    raw = [[], []] if documents is None else [documents.first[0].tolist(), documents.last[0].tolist()]
    reach = list(mask.reach(seq))
    for is_transposed, same in ((False, mask), (True, AttentionMask(right, left, documents))):
        rows = intervals(same, 1, seq)
        expected = torch.stack([rows.first[0], rows.last[0]], dim=1).tolist()
        assert kernels().attended(seq, reach, *raw, is_transposed) == expected
    # Tiles: every attended key is in a listed tile, and a full tile is attended by all rows.
    begin = data.draw(st.integers(0, seq - 1))
    end = data.draw(st.integers(begin + 1, seq + 7))
    size = data.draw(st.integers(1, 9))
    first, last, full = kernels().tiles(seq, reach, *raw, [begin, end], size)
    rows = dense_mask(mask, 1, seq)[0, begin:end]
    listed = set(range(first, last + 1))
    assert {int(key) // size for key in rows.any(0).nonzero()} <= listed
    for tile, is_full in zip(range(first, last + 1), full, strict=True):
        block = rows[:, tile * size : (tile + 1) * size]
        assert is_full == bool(block.all() and block.shape == (end - begin, size))


def test_auto_takes_kernels_and_says_why_not() -> None:
    assert choose_path(CPU, torch.float32).name == cpu_paths()[0]
    half = choose_path(CPU, torch.float16)
    assert half.name == "torch" and "float16" in half.reason
    assert choose_path(torch.device("meta"), torch.bfloat16).name == "torch"
    assert choose_path(CPU, torch.float32, "torch").reason == "asked for"
    assert "portable" in describe_kernels()
    with pytest.raises(UsageError, match=r"path 'fast': known are auto, avx512"):
        choose_path(CPU, torch.float32, "fast")
    with pytest.raises(UsageError, match=r"no kernel for torch\.float64"):
        choose_path(CPU, torch.float64, "portable")


def test_large_heads_in_bf16_are_torchs_where_it_has_matrix_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        path = choose_path(CPU, torch.bfloat16, head_dim=128, kind="reversed")
        assert (path.name == "torch") is has_amx and ("AMX" in path.reason) is has_amx
        for dtype, head_dim, kind in (
            (torch.float32, 128, "causal"),
            (torch.bfloat16, 64, "reversed"),
            (torch.bfloat16, 128, "documents"),
        ):
            assert choose_path(CPU, dtype, head_dim=head_dim, kind=kind).name == cpu_paths()[0]


def test_without_the_extension_attention_takes_torchs_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_ledom.ops._kernels", None)
    for cached in (kernels_module.load_kernels, kernels_module.cpu_paths):
        cached.cache_clear()
    try:
        path = choose_path(CPU, torch.float32)
        assert path.name == "torch" and "setup.py build_ext" in path.reason
        assert describe_kernels().startswith("kernels: none;")
        q = torch.randn(1, 9, 2, 8)
        without = attention(q, q, q, REVERSED)
        with pytest.raises(UsageError, match=r"'portable' cannot serve this call.*cannot be imported"):
            attention(q, q, q, REVERSED, path="portable")
    finally:
        monkeypatch.undo()
        for cached in (kernels_module.load_kernels, kernels_module.cpu_paths):
            cached.cache_clear()
    torch.testing.assert_close(attention(q, q, q, REVERSED), without)


def test_every_path_gives_the_same() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 70, h, 24) for h in (6, 2, 2))
    mask = natural_order_mask(Direction.REVERSE, 33, documents_from_lengths(torch.tensor([0, 40, 100, 139]), 2, 70))
    results = {path: attention(q, k, v, mask, path=path) for path in PATHS if path in (*cpu_paths(), "torch")}
    assert len(results) >= 2
    for path, result in results.items():
        torch.testing.assert_close(result, results["torch"], rtol=1e-5, atol=1e-5, msg=path)


def test_strides_and_layouts_are_megatrons() -> None:
    """[S, B, H, D] seen as [B, S, H, D], keys and values as views of one tensor, and a transposed head dim."""
    torch.manual_seed(4)
    packed = torch.randn(31, 2, 4 * 3 * 16)
    q, k, v = (x.transpose(0, 1) for x in packed.view(31, 2, 4, 48).split(16, dim=-1))
    d_output = torch.randn(2, 31, 4, 16)
    expected = attention(*(x.contiguous() for x in (q, k, v)), REVERSED)
    found = attention(q, k, v, REVERSED)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.transpose(0, 1).is_contiguous(), "Megatron's next view needs no copy"
    odd = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert odd.stride(-1) != 1
    torch.testing.assert_close(attention(odd, k, v, REVERSED), expected, rtol=0, atol=0)
    packed.requires_grad_()
    q, k, v = (x.transpose(0, 1) for x in packed.view(31, 2, 4, 48).split(16, dim=-1))
    (gradient,) = torch.autograd.grad(attention(q, k, v, REVERSED), packed, d_output)
    (same,) = torch.autograd.grad(attention(q, k, v, REVERSED, path="torch"), packed, d_output)
    torch.testing.assert_close(gradient, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(6, 2, 2), (2, 1, 1), (1, 1, 1)])
def test_results_do_not_depend_on_the_number_of_threads(heads: tuple[int, ...]) -> None:
    """With fewer heads than threads a head's queries and keys are taken apart."""
    torch.manual_seed(5)
    inputs = [torch.randn(1, 500, h, 64, requires_grad=True) for h in heads]
    d_output = torch.randn(1, 500, heads[0], 64)
    documents = documents_from_lengths(torch.tensor([2, 150, 151, 400, 490]), 1, 500)  # padding at both ends
    masks = (REVERSED, natural_order_mask(Direction.REVERSE, 120, documents))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            found = []
            for mask in masks:
                output = attention(*inputs, mask)
                found += [output, *torch.autograd.grad(output, inputs, d_output)]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_ops_are_registered_as_torch_wants_them() -> None:
    q, k, v = (torch.randn(2, 13, h, 8, requires_grad=True) for h in (4, 2, 2))
    documents = documents_from_lengths(torch.tensor([0, 9, 20]), 2, 13)
    for first, last in ((None, None), (documents.first, documents.last)):
        torch.library.opcheck(attention_op(), (q, k, v, first, last, 0, 13, 0.3, "portable"))
    with torch.no_grad():
        output, lse = attention_with_lse(q, k, v, REVERSED, 0.3, "portable")
        arguments = (output, q, k, v, output, lse, None, None, 0, 13, 0.3, "portable")
        torch.library.opcheck(attention_backward_op(), arguments)
    tables = rope_tables(torch.tensor([1.0, 0.1]), 13)
    torch.library.opcheck(rope_op(), (q, *tables, documents.first, documents.last, True, False, False))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(1, 8, 4, 16)
    with pytest.raises(UsageError, match="G divides H"):
        attention(x, x[:, :, :3], x[:, :, :3], REVERSED)
    with pytest.raises(UsageError, match="give all three one dtype"):
        attention(x, x.bfloat16(), x, REVERSED)
    longer = documents_from_lengths(torch.tensor([0, 9]), 1, 9)
    with pytest.raises(UsageError, match=r"document bounds are torch\.int32"):
        attention(x, x, x, model_order_mask(documents=longer))
    steps_back = Documents(torch.tensor([[0, 0, 2, 1, 1, 1, 1, 1]]).int(), torch.full((1, 8), 7).int())
    with pytest.raises(ValueError, match="documents step back"):
        attention(x, x, x, model_order_mask(documents=steps_back))
    with pytest.raises(UsageError, match="do not fit 8 tokens"):
        rope(x, *rope_tables(torch.tensor([1.0]), 7), from_end=True)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = tool_environment() | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


def test_the_extension_needs_nothing_but_the_interpreter() -> None:
    folder = Path(kernels().__file__).parent
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _kernels; print(_kernels.cpu_paths(), *sys.modules)"
    done = run_python("-I", "-S", "-c", code, str(folder))
    assert done.returncode == 0, done.stderr
    paths, *modules = done.stdout.split()
    assert "portable" in paths and not {"torch", "numpy"} & set(modules)


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path: Path) -> None:
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "o")]
    missing = {"CC": str(tmp_path / "no-compiler"), "CXX": str(tmp_path / "no-compiler")}
    env = {name: value for name, value in os.environ.items() if name != "LEDOM_KERNELS"} | missing

    def build(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=REPOSITORY, env=env | more, check=False
        )

    done = build()
    assert done.returncode == 0, done.stderr
    assert "NOT BUILT" in done.stdout and "torch's path" in done.stdout
    assert not list(tmp_path.rglob("*.so"))
    assert build(LEDOM_KERNELS="required").returncode != 0
    assert "LEDOM_KERNELS=none" in build(LEDOM_KERNELS="none").stdout


def test_traced_on_cuda_tensors_the_ops_keep_device_dtype_and_layout() -> None:
    """Without a GPU: fake tensors of one. Megatron's [S, B, H, D] stays one."""
    with FakeTensorMode():
        q, k = (torch.empty(13, 2, h, 64, device="cuda", dtype=torch.bfloat16).transpose(0, 1) for h in (4, 2))
        output, lse = attention_op()(q, k, k, None, None, 0, 13, 0.3, "sm80")
        assert (output.device.type, output.dtype, output.stride()) == ("cuda", torch.bfloat16, q.stride())
        assert (lse.device.type, lse.dtype, lse.shape) == ("cuda", torch.float32, (2, 4, 13))
        arguments = (output, q, k, k, output, lse, None, None, 0, 13, 0.3, "sm80")
        assert [x.stride() for x in attention_backward_op()(*arguments)] == [q.stride(), k.stride(), k.stride()]
        table = torch.empty(13, 32, device="cuda")
        assert rope_op()(q, table, table, None, None, True, False, False).stride() == q.stride()


def test_a_kernel_keeps_to_its_own_device() -> None:
    x = torch.randn(1, 8, 1, 64)
    with pytest.raises(UsageError, match=r"'sm80' cannot serve this call: this build has .* on this processor"):
        attention(x, x, x, REVERSED, path="sm80")
    with pytest.raises(ValueError, match=r"no such path|path 'sm80' is for tensors on cuda, and these are on cpu"):
        attention_with_lse(x, x, x, REVERSED, 0.3, "sm80")
