"""Matrix loads and products of a warp: ldmatrix, mma.sync. PTX ISA 9.0, 9.7.14.

The fragments are those that csrc/reversed_attention/cuda/device.h draws. Bits of bf16 pairs are seen as [.., 8, 8]
numbers of 16 bits: lane 4 * g + t holds row g, columns 2t and 2t + 1.
"""

from __future__ import annotations

import numpy as np

from ptx.arithmetic import unknown
from ptx.machine import Action, Group, Machine, instruction
from ptx.order import Array
from ptx.program import Instruction, Operand, Vector
from ptx.transfers import whole_warps


def registers(operand: Operand, count: int, said: Instruction) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector) or len(operand.items) != count:
        raise unknown(said)
    return operand.items


def floats(bits: Array) -> Array:
    """bf16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@instruction("ldmatrix")
def load_matrices(machine: Machine, said: Instruction) -> Action:
    words = said.opcode.replace("shared::cta", "shared").split(".")
    is_turned = "trans" in words
    if [x for x in words if x != "trans"] != ["ldmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16"]:
        raise unknown(said)
    targets = [machine.target(x, "b32") for x in registers(said.operands[0], 4, said)]
    base, offset = machine.address(said.operands[1], "u32")

    def run(group: Group) -> None:
        lanes = whole_warps(group)
        places = machine.shared.words(lanes, base[lanes].astype(np.int64) + offset, 16)
        rows = machine.shared.load(lanes, places, machine.step)  # a row of 8 from each lane
        matrices = rows.view(np.uint16).reshape(-1, 4, 8, 8)
        if is_turned:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        found = matrices.view(np.uint32).reshape(-1, 4, 32)
        for i, target in enumerate(targets):
            target[lanes] = found[:, i].reshape(-1)

    return run


@instruction("mma")
def multiply_add(machine: Machine, said: Instruction) -> Action:
    if said.opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        raise unknown(said)
    d, a, b, c = (registers(x, n, said) for x, n in zip(said.operands, (4, 4, 2, 4), strict=True))
    targets = [machine.target(x, "f32") for x in d]
    left, right = ([machine.read(x, "b32") for x in operand] for operand in (a, b))
    sums = [machine.read_lanes(x, "f32") for x in c]

    def run(group: Group) -> None:
        lanes = whole_warps(group)

        def parts(row: Array) -> Array:
            return row[lanes].view(np.uint16).reshape(-1, 8, 8)

        rows = [np.concatenate([parts(left[i]), parts(left[i + 2])], axis=2) for i in (0, 1)]
        x = floats(np.concatenate(rows, axis=1))  # [warps, 16 rows, 16]
        y = floats(np.concatenate([parts(r) for r in right], axis=2))  # [warps, 8 columns, 16]
        product = x @ y.swapaxes(1, 2)
        for half in (0, 1):
            of_rows = product[:, 8 * half : 8 * half + 8].reshape(-1, 2)
            for i in (0, 1):
                targets[2 * half + i][lanes] = of_rows[:, i] + sums[2 * half + i][lanes]

    return run
