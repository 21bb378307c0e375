"""Loads, stores, asynchronous copies, barriers, branches, shuffles. PTX ISA 9.0, 9.7.9, 9.7.12, 9.7.13."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import is_immediate, put, unknown
from ptx.machine import DTYPES, Action, Barrier, Group, Machine, instruction
from ptx.memory import FaultError
from ptx.order import Array
from ptx.program import WIDTHS, Instruction, Operand, Symbol, Vector, resolve

COUNTS = {"v2": 2, "v4": 4}


def _space_and_type(said: Instruction) -> tuple[str, int, str]:
    """Space, count and type of a load or a store."""
    _, space, *words, kind = said.opcode.replace("shared::cta", "shared").split(".")
    count = COUNTS.get(words[-1], 1) if words else 1
    rest = words[:-1] if count > 1 else words
    if kind not in WIDTHS or kind == "pred" or space not in ("param", "global", "shared") or rest not in ([], ["nc"]):
        raise unknown(said)
    return space, count, kind


def _items(operand: Operand, count: int, said: Instruction) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise unknown(said)
    return items


@instruction("ld")
def load(machine: Machine, said: Instruction) -> Action:
    space, count, kind = _space_and_type(said)
    base, offset = machine.address(said.operands[1], "u32" if space == "shared" else "u64")
    targets = [machine.target(x, kind, True) for x in _items(said.operands[0], count, said)]
    dtype = np.dtype(DTYPES[kind])

    def run(group: Group) -> None:
        addresses = base[group.lanes].astype(np.int64) + offset
        if space == "shared":
            words = machine.shared.words(group.lanes, addresses, count * dtype.itemsize)
            values = machine.shared.load(group.lanes, words, machine.step).view(dtype)
        else:
            where = machine.memory if space == "global" else machine.params
            values = where.load(group.lanes, addresses, dtype, count)
        for i, target in enumerate(targets):
            target[group.lanes] = values[:, i]

    return run


@instruction("st")
def store(machine: Machine, said: Instruction) -> Action:
    space, count, kind = _space_and_type(said)
    if space == "param" or "nc" in said.opcode.split("."):
        raise unknown(said)
    base, offset = machine.address(said.operands[0], "u32" if space == "shared" else "u64")
    sources = [machine.read_lanes(x, kind, True) for x in _items(said.operands[1], count, said)]

    def run(group: Group) -> None:
        addresses = base[group.lanes].astype(np.int64) + offset
        values = np.stack([x[group.lanes] for x in sources], axis=1)
        if space == "global":
            machine.memory.store(group.lanes, addresses, values)
        else:
            words = machine.shared.words(group.lanes, addresses, values.itemsize * count)
            machine.shared.store(group.lanes, words, values.view(np.uint32), machine.step)

    return run


# ---- copies from global to shared memory


@dataclass
class Copies:
    """What one instruction started: a copy for each lane, each in the group that its lane was filling."""

    lanes: Array
    groups: Array
    words: Array
    addresses: Array  # in global memory
    num_words: Array  # that are read there; the others become 0
    text: str


class CopyQueue:
    """Copies under way. Nothing arrives before a wait that covers it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.group = np.zeros(machine.num_lanes, np.int64)  # that each lane is filling
        self.pending: list[Copies] = []
        machine.at_end.append(self.check_end)

    def complete(self, group: Group, keep: int) -> None:
        """The copies of these lanes arrive, but for those of their last `keep` groups."""
        still = []
        for copies in self.pending:
            due = group.mask[copies.lanes] & (copies.groups < self.group[copies.lanes] - keep)
            self._arrive(copies, due)
            if not due.all():
                left = ~due
                still.append(Copies(*(x[left] for x in (copies.lanes, copies.groups, copies.words, copies.addresses,
                                                         copies.num_words)), copies.text))  # fmt: skip
        self.pending = still

    def _arrive(self, copies: Copies, due: Array) -> None:
        machine, words = self.machine, copies.words[due]
        values = np.zeros(words.shape, np.uint32)
        filled = copies.num_words[due] > 0
        if filled.any():
            values[filled] = machine.memory.load(
                copies.lanes[due][filled], copies.addresses[due][filled], np.dtype(np.uint32), words.shape[1]
            )
        machine.shared.complete(words, values, machine.order.own[copies.lanes[due], None], machine.step)

    def check_end(self) -> None:
        if self.pending:
            first = self.pending[0]
            raise FaultError(f"a thread ends while copies are under way that nobody waits for\n  {first.text}",
                             int(first.lanes[0]))  # fmt: skip


def _queue(machine: Machine) -> CopyQueue:
    found = machine.state.setdefault("copies", None) or CopyQueue(machine)
    machine.state["copies"] = found
    assert isinstance(found, CopyQueue)
    return found


def copy_async(machine: Machine, said: Instruction) -> Action:
    """The instructions that begin with cp.async, but for those that move boxes."""
    queue = _queue(machine)
    if said.opcode == "cp.async.commit_group":

        def commit(group: Group) -> None:
            queue.group[group.lanes] += 1

        return commit
    if said.opcode == "cp.async.wait_group":
        keep = is_immediate(said, 0)
        return lambda group: queue.complete(group, keep)
    if said.opcode not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        raise unknown(said)
    size = is_immediate(said, 2)
    if size != 16 and (size not in (4, 8) or ".cg." in said.opcode):
        raise unknown(said)
    to, to_offset = machine.address(said.operands[0], "u32")
    of, of_offset = machine.address(said.operands[1], "u64")
    read_bytes = machine.read_lanes(said.operands[3], "u32")

    def start(group: Group) -> None:
        lanes = group.lanes
        words = machine.shared.words(lanes, to[lanes].astype(np.int64) + to_offset, size)
        addresses, num_bytes = of[lanes].astype(np.int64) + of_offset, read_bytes[lanes]
        if not np.isin(num_bytes, (0, size)).all():
            raise FaultError(f"copies part of its {size} bytes: not known here")
        machine.memory.check_access(lanes[num_bytes > 0], addresses[num_bytes > 0], size)
        machine.shared.begin_copy(lanes, words)
        queue.pending.append(Copies(lanes, queue.group[lanes], words, addresses, num_bytes // 4, str(said)))

    return start


# ---- control


@instruction("bra")
def branch(machine: Machine, said: Instruction) -> Action:
    (label,) = said.operands
    if said.opcode not in ("bra", "bra.uni") or not isinstance(label, Symbol):
        raise unknown(said)
    target = resolve(machine.kernel, label)

    def run(group: Group) -> None:
        machine.pc[group.lanes] = target

    return run


@instruction("ret", "exit")
def end(machine: Machine, said: Instruction) -> Action:
    def run(group: Group) -> None:
        machine.pc[group.lanes] = machine.end

    return run


@instruction("bar")
def barrier(machine: Machine, said: Instruction) -> Action:
    if said.opcode == "bar.warp.sync":
        return lambda group: machine.order.meet_in_warps(whole_warps(group), machine.step)
    if said.opcode not in ("bar.sync", "bar.arrive") or len(said.operands) < 1 + (said.opcode == "bar.arrive"):
        raise unknown(said)
    number = machine.read_lanes(said.operands[0], "u32")
    count = machine.read_lanes(said.operands[1], "u32") if len(said.operands) > 1 else None
    is_sync = said.opcode == "bar.sync"

    def run(group: Group) -> None:
        lanes = whole_warps(group)
        keys = machine.lane_blocks[lanes] * 16 + number[lanes]
        for key in np.unique(keys):
            chosen = lanes[keys == key]
            _come(machine, int(key), chosen, int(count[chosen[0]]) if count is not None else machine.threads, is_sync)

    return run


def _come(machine: Machine, key: int, lanes: Array, expected: int, is_sync: bool) -> None:
    """Lanes of one block come to a barrier, to wait there or not."""
    at = machine.barriers.setdefault(key, Barrier(expected))
    if at.expected != expected:
        raise FaultError(f"a barrier for {expected} threads at which others wait for {at.expected}", int(lanes[0]))
    at.arrived += len(lanes)
    if at.arrived > expected:
        raise FaultError(f"{at.arrived} threads come to a barrier for {expected}", int(lanes[0]))
    published = machine.order.published(lanes, machine.step)
    at.published = published if at.published is None else np.maximum(at.published, published)
    if is_sync:
        at.waiting.append(lanes)
        machine.waits[lanes] = True
    if at.arrived == expected:
        del machine.barriers[key]
        for waiting in at.waiting:
            machine.waits[waiting] = False
            machine.order.learn(waiting, at.published)


def whole_warps(group: Group) -> Array:
    """The lanes of a group that must be whole warps, [warps * 32]."""
    per_warp = group.mask.reshape(-1, 32).sum(axis=1)
    if not np.isin(per_warp, (0, 32)).all():
        raise FaultError("not all lanes of a warp take part", int(group.lanes[0]))
    return group.lanes


@instruction("shfl")
def shuffle(machine: Machine, said: Instruction) -> Action:
    if said.opcode != "shfl.sync.bfly.b32" or len(said.operands) != 5:
        raise unknown(said)
    items = said.operands[0].items if isinstance(said.operands[0], Vector) else (said.operands[0],)
    target, is_valid = machine.target(items[0], "b32"), machine.target(items[1], "pred") if items[1:] else None
    value, distance, clamp, members = (machine.read_lanes(x, "b32") for x in said.operands[1:])

    def run(group: Group) -> None:
        lanes = whole_warps(group)
        if (clamp[lanes] != 31).any() or (members[lanes] != 0xFFFFFFFF).any():
            raise FaultError("a shuffle among part of a warp: not known here", int(lanes[0]))
        others = lanes & ~31 | (lanes & 31) ^ distance[lanes]
        target[lanes] = value[others]
        if is_valid is not None:
            put(is_valid, np.True_, group)

    return run
