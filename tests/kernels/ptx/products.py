"""sm_90: products of a warpgroup (wgmma). PTX ISA 9.0, 9.7.15.

A product is under way from its issue to the wait of each of its warps. Until then nobody may touch its accumulators,
write its registers, or write the shared memory that it reads; since all that is refused, its numbers are computed at
issue. Both tiles of shared memory lie in rows of 128 bytes with the 128-byte swizzle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import is_immediate, unknown
from ptx.barriers import ROW_BYTES, bulk_copy, swizzled
from ptx.machine import Action, Group, Machine, instruction
from ptx.matrices import floats, registers
from ptx.memory import WORD, FaultError
from ptx.order import Array
from ptx.program import Immediate, Instruction, PtxError, Register, Vector
from ptx.transfers import copy_async

WARPGROUP = 128
INNER = 16  # columns of the left side, rows of the right side


@instruction("cp")
def copy(machine: Machine, said: Instruction) -> Action:
    return (bulk_copy if said.opcode.startswith("cp.async.bulk") else copy_async)(machine, said)


@dataclass
class Product:
    """One that is under way; of a warp's point of view."""

    accumulators: list[int]
    sources: list[int]  # registers of the left side
    words: Array  # of shared memory
    warps_left: list[int]  # that have not waited for it, shared by the four


class Products:
    """What each warp has under way: groups, the last of which is being filled."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.groups: list[list[list[Product]]] = [[[]] for _ in range(machine.num_lanes // 32)]
        self.fenced = np.full(machine.num_lanes // 32, -1, np.int64)  # the last step at which each warp had a fence
        machine.changed = [np.zeros(machine.num_lanes, np.int32) for _ in machine.registers]
        machine.at_end.append(self.check_end)

    def start(self, lanes: Array, product: Product) -> None:
        for warp in lanes[::32] // 32:
            self.groups[warp][-1].append(product)
        self._mark(self.machine.in_flight, product.accumulators, lanes)
        self._mark(self.machine.held, product.sources, lanes)

    def check_fenced(self, lanes: Array, product: Product) -> None:
        """Registers written after the warp's last fence must not be used, unless products under way wrote them."""
        changed = self.machine.changed
        assert changed is not None
        fenced = np.repeat(self.fenced[lanes[::32] // 32], 32)
        for register in [*product.accumulators, *product.sources]:
            if (changed[register][lanes] > fenced).any():
                name = self.machine.kernel.registers[register][0]
                raise FaultError(f"register {name} was written after the last wgmma.fence", int(lanes[0]))
        for other in {id(x): x for w in lanes[::32] // 32 for g in self.groups[w] for x in g}.values():
            mine, its = product.accumulators, other.accumulators
            if mine != its and not set(mine).isdisjoint(its):
                raise FaultError("a product under way has some of these accumulators", int(lanes[0]))

    def commit(self, group: Group) -> None:
        for warp in np.unique(group.lanes // 32):
            self.groups[warp].append([])

    def wait(self, group: Group, keep: int) -> None:
        machine = self.machine
        for warp in np.unique(group.lanes // 32):
            groups = self.groups[warp]
            num_due = max(0, len(groups) - 1 - keep)
            due, self.groups[warp] = groups[:num_due], groups[num_due:]
            lanes = np.arange(warp * 32, warp * 32 + 32)
            left = [x for g in self.groups[warp] for x in g]
            for product in (x for g in due for x in g):
                product.warps_left.remove(int(warp))
                machine.shared.note_read_by_warp(int(lanes[0]), product.words, machine.step)
                if not product.warps_left:
                    machine.shared.end_reading(product.words)
                still = {r for x in left for r in x.accumulators}, {r for x in left for r in x.sources}
                self._mark(machine.in_flight, [r for r in product.accumulators if r not in still[0]], lanes, False)
                self._mark(machine.held, [r for r in product.sources if r not in still[1]], lanes, False)

    def _mark(self, marks: dict[int, Array], names: list[int], lanes: Array, value: bool = True) -> None:
        for register in names:
            mask = marks.get(register)
            if mask is None:
                mask = marks[register] = np.zeros(self.machine.num_lanes, bool)
            mask[lanes] = value
            if not value and not mask.any():
                del marks[register]

    def check_end(self) -> None:
        for warp, groups in enumerate(self.groups):
            if any(groups):
                raise FaultError("a thread ends while products are under way", warp * 32)


def _products(machine: Machine) -> Products:
    found = machine.state.get("products") or Products(machine)
    machine.state["products"] = found
    assert isinstance(found, Products)
    return found


@instruction("wgmma")
def warpgroup_product(machine: Machine, said: Instruction) -> Action:
    if machine.threads % WARPGROUP:
        raise PtxError(f"a block of {machine.threads} threads is not made of warpgroups")
    products = _products(machine)
    if said.opcode == "wgmma.fence.sync.aligned":

        def note(group: Group) -> None:
            products.fenced[np.unique(group.lanes // 32)] = machine.step

        return note
    if said.opcode == "wgmma.commit_group.sync.aligned":
        return products.commit
    if said.opcode == "wgmma.wait_group.sync.aligned":
        keep = is_immediate(said, 0)
        return lambda group: products.wait(group, keep)
    shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", said.opcode)
    if shape is None:
        raise unknown(said)
    return _multiply(machine, said, int(shape[1]), products)


def _multiply(machine: Machine, said: Instruction, columns: int, products: Products) -> Action:
    is_left_held = isinstance(said.operands[1], Vector)
    if columns % 8 or not 8 <= columns <= 256 or len(said.operands) != 8 - is_left_held:
        raise unknown(said)
    # Accumulators are not among the operands that the machine checks: products may follow each other in them.
    names = [x.index for x in registers(said.operands[0], columns // 2, said) if isinstance(x, Register)]
    signs_and_turns = [is_immediate(said, i) for i in range(4, len(said.operands))]
    if signs_and_turns[:2] != [1, 1] or not set(signs_and_turns[2:]) <= {0, 1}:
        raise unknown(said)
    *left_turned, right_turned = signs_and_turns[2:]
    left = [machine.read_lanes(x, "b32") for x in registers(said.operands[1], 4, said)] if is_left_held else []
    sources = [x.index for x in said.operands[1].items if isinstance(x, Register)] if is_left_held else []  # type: ignore[union-attr]
    left_place = None if is_left_held else machine.read_lanes(said.operands[1], "b64")
    right_place = machine.read_lanes(said.operands[2], "b64")
    adds = said.operands[3]
    if isinstance(adds, Immediate):
        is_sum = np.full(machine.num_lanes, bool(is_immediate(said, 3)))
    else:
        is_sum = machine.read_lanes(adds, "pred")
    rows = [machine.registers[x] for x in names]

    def run_one(lanes: Array) -> None:
        words = []
        if left_place is None:
            halves = [np.stack([r[lanes] for r in left[i : i + 2]], 1).view(np.uint16) for i in (0, 2)]
            # [warp, g, t, row half, pair] of the two halves of columns -> 64 rows of 16
            parts = [x.reshape(4, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(64, 8) for x in halves]
            a = floats(np.concatenate(parts, axis=1))
        else:
            a, read = _operand(machine, lanes, left_place, 64, bool(left_turned[0]))
            words.append(read)
        b, read = _operand(machine, lanes, right_place, columns, bool(right_turned))
        product = Product(names, sources, np.concatenate([*words, read]), list(map(int, lanes[::32] // 32)))
        products.check_fenced(lanes, product)
        total = a @ b.T
        # Element (16w + 8h + g, 8j + 2t + i) is register 4j + 2h + i of lane 32w + 4g + t.
        total = total.reshape(4, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, 128)
        adding = is_sum[lanes]
        if adding.any() != adding.all():
            raise FaultError("threads of a warpgroup differ on whether a product adds", int(lanes[0]))
        if adding.any():
            _check_sum(machine, lanes, names)
            total = total + np.stack([r[lanes] for r in rows])
        for row, values in zip(rows, total, strict=True):
            row[lanes] = values
        for name in names:
            _define(machine, lanes, name)
        products.start(lanes, product)

    def run(group: Group) -> None:
        per_group = group.mask.reshape(-1, WARPGROUP).sum(axis=1)
        if not np.isin(per_group, (0, WARPGROUP)).all():
            raise FaultError("not all threads of a warpgroup take part", int(group.lanes[0]))
        for number in np.flatnonzero(per_group):
            run_one(np.arange(number * WARPGROUP, (number + 1) * WARPGROUP))

    return run


def _check_sum(machine: Machine, lanes: Array, names: list[int]) -> None:
    for name in names:
        missing = machine.undefined.get(name)
        if missing is not None and missing[lanes].any():
            raise FaultError(
                f"adds to register {machine.kernel.registers[name][0]}, which was never written", int(lanes[0])
            )


def _define(machine: Machine, lanes: Array, name: int) -> None:
    missing = machine.undefined.get(name)
    if missing is not None:
        still = missing.copy()
        still[lanes] = False
        if still.any():
            machine.undefined[name] = still
        else:
            del machine.undefined[name]


def _operand(machine: Machine, lanes: Array, places: Array, count: int, is_turned: bool) -> tuple[Array, Array]:
    """A side of a product from shared memory: [count, 16] numbers, and the words that it lies in."""
    place = int(places[lanes[0]])
    if (places[lanes] != place).any():
        raise FaultError("threads of a warpgroup differ on where an operand lies", int(lanes[0]))
    if place >> 62 != 1 or place >> 49 & 7 or place & ~0xC00E_3FFF_3FFF_3FFF:
        raise FaultError(f"operand {place:#x}: only the 128-byte swizzle without offset is known here", int(lanes[0]))
    start, panel, eight_rows = (place >> shift & 0x3FFF for shift in (0, 16, 32))
    # Of words: two neighbours of a row of 128 bytes.
    if is_turned:  # the 16 are rows, `count` runs along them
        inner, outer = np.arange(INNER)[:, None], np.arange(0, count, 2)[None]
        along = outer // 64 * panel * 16 + outer % 64 * 2
    else:
        inner, outer = np.arange(count)[:, None], np.arange(0, INNER, 2)[None]
        along = outer * 2
    addresses = start * 16 + inner // 8 * eight_rows * 16 + inner % 8 * ROW_BYTES + along
    words = machine.shared.words(np.full(addresses.size, lanes[0]), swizzled(addresses.reshape(-1)), WORD).reshape(-1)
    # All four warps read; each must know of what it reads.
    for lane in lanes[::32][1:]:
        machine.shared.check_written(np.array([lane]), words.reshape(1, -1))
    data = machine.shared.begin_reading(int(lanes[0]), words).view(np.uint16)
    shape = (INNER, count) if is_turned else (count, INNER)
    numbers = floats(data.reshape(shape))
    return (numbers.T if is_turned else numbers), words
