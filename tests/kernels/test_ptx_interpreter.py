"""The interpreter itself: what it says of small kernels with a known fault, and what instructions give.

Each kernel gets the address of 64 numbers of 4 bytes and is run by two warps, and 1 KiB of shared memory.
"""

from __future__ import annotations

import numpy as np
import pytest
from ptx.machine import Launch, TensorMap, run_launch
from ptx.memory import GlobalMemory
from ptx.program import PtxError, parse

HEAD = """
.version 9.0
.target {target}
.address_size 64
.file 1 "/somewhere/probe.cu"
.extern .shared .align 128 .b8 arena[];
.visible .entry probe(
    .param .u64 probe_param_0
)
.maxntid 64, 1, 1
{{
    .reg .pred %p<4>;
    .reg .b16 %rs<4>;
    .reg .f32 %f<80>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<8>;
    .loc 1 7 0
    ld.param.u64 %rd1, [probe_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
    mov.b32 %r2, arena;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
    xor.b32 %r5, %r4, 4;
    setp.lt.u32 %p1, %r1, 32;
    setp.eq.u32 %p2, %r1, 0;
    .loc 1 42 3
{body}
    ret;
}}
"""


def run(body: str, target: str = "sm_80", *, is_writable: bool = True, shared_bytes: int = 1024) -> np.ndarray:
    """Run a kernel; returns its 64 numbers, which were 0, 1, 2 ... before."""
    data = np.arange(64, dtype=np.uint32)
    memory = GlobalMemory()
    memory.add("numbers", data.ctypes.data, data.view(np.uint8), is_writable)
    address = np.uint64(data.ctypes.data).tobytes()
    maps = {0: TensorMap(data.ctypes.data, (64, 2), (1, 64), (64, 2))}
    launch = Launch("probe", (1, 1, 1), 64, shared_bytes, [address], maps)
    run_launch(parse(HEAD.format(body=body, target=target)), launch, memory, 2000)
    return data


FAULTS = {
    "an unknown instruction": (
        "bfind.u32 %r6, %r1;",
        r"not known here: PTX line \d+: bfind\.u32 %r6, %r1, from probe\.cu:42",
    ),
    "an unknown form": ("add.sat.s32 %r6, %r1, %r1;", r"a form .* not known here: PTX line \d+: add\.sat\.s32"),
    "an unknown form of mma": (
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3}, {%r1,%r1}, {%r1}, {%f0,%f1,%f2,%f3};",
        r"a form .* not known here",
    ),
    "a label that is not there": ("bra nowhere;", r"no label nowhere"),
    "a register of another size": ("add.s32 %rd5, %r1, %r1;", r"register \('%rd5', 'b64'\) as a result of type s32"),
    "a register never written": (
        "st.global.u32 [%rd4], %r9;",
        r"reads register %r9, which was never written\n.*42 \[block 0, 0, 0; thread 0\]",
    ),
    "a register that some have written": (
        "@%p1 mov.u32 %r9, 1;\nst.global.u32 [%rd4], %r9;",
        r"%r9, which was never written\n.*thread 32\]",
    ),
    "an address outside": (
        "st.global.u32 [%rd4+4], %r1;",
        r"4 bytes at global address 0x\w+ lie in no buffer: 0 bytes after the end of numbers\n.*thread 63\]",
    ),
    "a misaligned address": ("ld.global.u32 %r6, [%rd4+2];", r"global address 0x\w+ is not a multiple of 4"),
    "a misaligned vector": ("ld.global.v2.u32 {%r6, %r7}, [%rd4];", r"is not a multiple of 8\n.*thread 1\]"),
    "a store to what is read": (None, r"a store to numbers, which is only read"),
    "a parameter that is not there": (
        "ld.param.u64 %rd5, [probe_param_0+8];",
        r"offset 8 of parameter 0 are not there",
    ),
    "a shared address outside": (
        "st.shared.u32 [%r4+900], %r1;",
        r"4 bytes at shared address 1024 lie outside the block's 1024\n.*thread 31\]",
    ),
    "a misaligned shared address": ("st.shared.u32 [%r4+2], %r1;", r"shared address 2 is not a multiple of 4"),
    "shared memory never written": ("ld.shared.u32 %r6, [%r4];", r"reads shared memory that nobody has written"),
    "a race": (
        "st.shared.u32 [%r4], %r1;\nld.shared.u32 %r6, [%r5];",
        r"reads what thread 1 wrote, without a barrier between\n.*thread 0\]",
    ),
    "a race of warps": (
        "st.shared.u32 [%r4], %r1;\nbar.warp.sync -1;\nxor.b32 %r6, %r4, 128;\nld.shared.u32 %r6, [%r6];",
        r"reads what thread 32 wrote, without a barrier between",
    ),
    "an early overwriting": (
        "st.shared.u32 [%r4], %r1;\nbar.sync 0;\nld.shared.u32 %r6, [%r5];\nst.shared.u32 [%r4], %r6;",
        r"overwrites what others may still be reading",
    ),
    "stores to one word": ("st.shared.u32 [%r2], %r1;", r"another thread stores to the same word at the same time"),
    "a copy under way": (
        "cp.async.ca.shared.global [%r4], [%rd4], 4, 4;\ncp.async.commit_group;\nbar.sync 0;\n"
        "ld.shared.u32 %r6, [%r4];",
        r"reads shared memory to which a copy is under way",
    ),
    "a copy of others": (
        "cp.async.ca.shared.global [%r4], [%rd4], 4, 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group 0;\nld.shared.u32 %r6, [%r5];",
        r"reads what thread 1 wrote, without a barrier between",
    ),
    "a copy nobody waits for": (
        "cp.async.ca.shared.global [%r4], [%rd4], 4, 4;\ncp.async.commit_group;",
        r"a thread ends while copies are under way that nobody waits for\n  PTX line \d+: cp\.async",
    ),
    "a deadlock": (
        "@%p1 bar.sync 0;",
        r"deadlock: 32 threads wait at PTX line \d+: @%p1 bar\.sync 0, .*\n  32 threads have ended",
    ),
    "part of a warp": ("@%p2 bar.sync 0;", r"not all lanes of a warp take part"),
    "part of a warp that shuffles": (
        "@%p2 shfl.sync.bfly.b32 %r6|%p3, %r1, 1, 31, -1;",
        r"not all lanes of a warp take part",
    ),
    "a division by zero": ("mov.u32 %r6, 0;\ndiv.s32 %r7, %r1, %r6;", r"divides by zero"),
    "no end": ("again:\nbra again;", r"no end after 2000 instructions: PTX line \d+: bra again"),
}

BARRIER = "@%p2 mbarrier.init.shared::cta.b64 [%r2], 1;\n"
READY = BARRIER + "@%p2 fence.mbarrier_init.release.cluster;\nbar.sync 0;\n"
BOX = (
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r6], "
    "[%rd5, {%r7, %r7}], [%r2];\n"
)
LOAD = (
    "mov.b64 %rd5, probe_param_0;\ncvta.param.u64 %rd5, %rd5;\nmov.u32 %r6, 1024;\nmov.u32 %r7, 0;\n"
    + READY
    + "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;\n"
    + "@%p2 "
    + BOX
)
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], 0;\n"
STORE = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd5, {%r7, %r7}], [%r6];\n"
HOPPER_FAULTS = {
    "a barrier that nobody made": (
        "mbarrier.arrive.shared::cta.b64 _, [%r2];",
        r"no barrier was made at shared address 0",
    ),
    "a barrier not known yet": (
        BARRIER + "mbarrier.arrive.shared::cta.b64 _, [%r2];",
        r"for all that this thread knows\n.*thread 1\]",
    ),
    "too many arrivals": (
        READY + "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;\n"
        "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r2];",
        r"arrives at a barrier at which all 1 have arrived",
    ),
    "a phase that never ends": (READY + WAIT, r"deadlock: 64 threads wait at PTX line \d+: mbarrier\.try_wait"),
    "a box that nobody waits for": (
        LOAD + "ld.shared.u32 %r8, [%r6];",
        r"reads shared memory to which a copy is under way",
    ),
    "fewer bytes than expected": (LOAD.replace("256", "512") + WAIT, r"deadlock: 64 threads wait at"),
    "a barrier not made known to copies": (
        LOAD.replace("@%p2 fence.mbarrier_init.release.cluster;\n", "") + WAIT,
        r"not made known to copies",
    ),
    "a box that is misaligned": (LOAD.replace("1024;", "1152;") + WAIT, r"not a multiple of 1024"),
    "a box of no tensor map": (
        LOAD.replace("cvta.param.u64 %rd5, %rd5;", "") + WAIT,
        r"no tensor map has the generic address",
    ),
    "an ordinary store not fenced": (
        LOAD + WAIT + "@%p2 st.shared.u32 [%r6], %r7;\n@%p2 " + STORE,
        r"asynchronous reader of what a store wrote, without a proxy fence",
    ),
    "a copy out that nobody waits for": (
        LOAD + WAIT + "@%p2 " + STORE,
        r"a thread ends while its copy may still read shared memory",
    ),
    "an early overwriting of what goes out": (
        LOAD + WAIT + "@%p2 " + STORE + "@%p2 st.shared.u32 [%r6], %r7;",
        r"writes shared memory that is being read asynchronously",
    ),
    "registers that are not there": (
        "setmaxnreg.inc.sync.aligned.u32 244;",
        r"a number of registers that is not allowed",
    ),
    "no whole warpgroup": (
        "mov.b64 %rd5, 0;\nsetp.eq.u32 %p3, 0, 1;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd5, %rd5, %p3, 1, 1, 0, 0;",
        r"a block of 64 threads is not made of warpgroups",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_each_fault_is_named_with_its_place(what: str) -> None:
    body, message = FAULTS[what]
    with pytest.raises(PtxError, match=message):
        run(body or "st.global.u32 [%rd4], %r1;", is_writable=body is not None)


@pytest.mark.parametrize("what", HOPPER_FAULTS)
def test_each_fault_of_sm90_is_named(what: str) -> None:
    body, message = HOPPER_FAULTS[what]
    with pytest.raises(PtxError, match=message):
        run(body, "sm_90a", shared_bytes=2048)


GIVES = {
    "a wide product": ("mul.wide.s32 %rd5, %r1, -3;\ncvt.u32.u64 %r6, %rd5;", lambda i: -3 * i),
    "the upper half of a product": ("mul.hi.s32 %r6, %r1, -3;", lambda i: -3 * i >> 32),
    "a quotient, towards zero": ("sub.s32 %r6, %r1, 32;\ndiv.s32 %r6, %r6, 5;", lambda i: int((i - 32) / 5)),
    "a rest of the dividend's sign": (
        "sub.s32 %r6, %r1, 32;\nrem.s32 %r6, %r6, 5;",
        lambda i: i - 32 - 5 * int((i - 32) / 5),
    ),
    "a shift by more than the width": ("shl.b32 %r6, %r1, 40;", lambda i: 0),
    "a shift that keeps the sign": ("sub.s32 %r6, %r1, 32;\nshr.s32 %r6, %r6, 40;", lambda i: -(i < 32)),
    "a choice": ("selp.b32 %r6, 7, %r1, %p1;", lambda i: 7 if i < 32 else i),
    "a branch that parts a warp": (
        "setp.lt.u32 %p3, %r1, 5;\nmov.u32 %r6, 1;\n@%p3 bra after;\nmov.u32 %r6, 2;\nafter:\nadd.u32 %r6, %r6, 10;",
        lambda i: 11 if i < 5 else 12,
    ),
    "a loop whose turns differ": (
        "mov.u32 %r6, 0;\nturn:\nadd.u32 %r6, %r6, 2;\nsetp.lt.u32 %p3, %r6, %r1;\n@%p3 bra turn;",
        lambda i: max(2, i + i % 2),
    ),
    "names of a scope of their own": (
        "mov.u32 %r6, 1;\n{\n.reg .b32 %r6;\nmov.u32 %r6, 2;\nadd.u32 %r7, %r6, %r1;\n}\nadd.u32 %r6, %r6, %r7;",
        lambda i: i + 3,
    ),
    "a shuffle": ("shfl.sync.bfly.b32 %r6|%p3, %r1, 3, 31, -1;", lambda i: i ^ 3),
    "two halves of a register": ("mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r6, {%rs2, %rs1};", lambda i: i << 16),
    "a pair of bf16, rounded to even": (
        "mov.f32 %f1, 0f3F808000;\nmov.f32 %f2, 0f3F818000;\ncvt.rn.bf16x2.f32 %r6, %f1, %f2;",
        lambda i: 0x3F803F82,
    ),
    "a power below the normal numbers": (
        "mov.f32 %f1, 0fC2FE0000;\nex2.approx.ftz.f32 %f2, %f1;\nmov.b32 %r6, %f2;",
        lambda i: 0,
    ),
    "a comparison with NaN": (
        "mov.f32 %f1, 0f7FC00000;\nsetp.ne.f32 %p3, %f1, %f1;\nselp.b32 %r6, 1, 0, %p3;\nsetp.neu.f32 %p3, %f1, %f1;\n"
        "@%p3 add.u32 %r6, %r6, 2;",
        lambda i: 2,
    ),
    "a copy that is read after a barrier": (
        "cp.async.ca.shared.global [%r4], [%rd4], 4, 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group 0;\nbar.sync 0;\nld.shared.u32 %r6, [%r5];",
        lambda i: i ^ 1,
    ),
    "zeros for a copy of nothing": (
        "cp.async.ca.shared.global [%r4], [%rd4], 4, 0;\ncp.async.commit_group;\n"
        "cp.async.wait_group 0;\nld.shared.u32 %r6, [%r4];",
        lambda i: 0,
    ),
    "rows of matrices": (
        "shl.b32 %r6, %r1, 4;\nst.shared.v4.u32 [%r6], {%r1, %r1, %r1, %r1};\nbar.sync 0;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r6];\nadd.u32 %r6, %r6, %r9;",
        lambda i: 2 * (i // 32 * 32) + 2 * (i % 32 // 4) + 24,
    ),
}


@pytest.mark.parametrize("what", GIVES)
def test_instructions_give_what_the_manual_says(what: str) -> None:
    body, expected = GIVES[what]
    found = run(body + "\nst.global.u32 [%rd4], %r6;")
    assert found.tolist() == [expected(i) % 2**32 for i in range(64)]


def test_a_box_comes_in_zero_filled_and_swizzled() -> None:
    """A tensor of one row of 64 and a box of two rows: the second one is zeros. Thread i reads word i of a row."""
    body = (
        LOAD.replace("256;", "256;")
        + WAIT
        + "add.u32 %r8, %r6, %r3;\nld.shared.u32 %r9, [%r8];\nst.global.u32 [%rd4], %r9;"
    )
    found = run(body, "sm_90a", shared_bytes=2048)
    before = np.arange(64, dtype=np.uint32)
    # Row 1 has its chunks of four words in place chunk ^ 1.
    assert found[:32].tolist() == before[:32].tolist()
    assert found[32:].tolist() == before[32:].reshape(-1, 2, 4)[:, ::-1].reshape(-1).tolist()
