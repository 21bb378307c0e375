"""sm_90: barriers in shared memory that count arrivals and bytes, copies of boxes (TMA), fences between proxies.

PTX ISA 9.0, 9.7.9.25 (copies), 9.7.13.15 (mbarrier). A copy that comes in completes only when no thread can go on, and
a copy that goes out when it is waited for: the latest that they may.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptx.arithmetic import is_immediate, put, unknown
from ptx.machine import NUM_AGENTS, Action, Group, Machine, TensorMap, instruction
from ptx.memory import GENERIC, PARAMS_BASE, WORD, FaultError, check
from ptx.order import NEVER, Array
from ptx.program import Address, Instruction, PtxError, Symbol, Vector
from ptx.transfers import whole_warps

LOAD = "cp.async.bulk.tensor.{}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.{}d.global.shared::cta.tile.bulk_group"
ROW_BYTES, CHUNK_BYTES, SWIZZLED_BYTES = 128, 16, 1024  # a row of a box, what is exchanged in it, the whole pattern
TOO_MANY = 1 << 20  # arrivals: the counters of the hardware are smaller


@dataclass
class CountingBarrier:
    """An mbarrier. The phase that is under way has a parity; it ends when nothing is pending any more."""

    count: int
    agent: int  # the column of Order for the copies that it counts
    owner: int  # the column of the thread that made it,
    made: int  # and when
    visible: int = int(NEVER)  # to copies, from which step of its maker on
    pending: int = 0
    bytes: int = 0
    parity: int = 0
    phase: Array | None = None  # what those who arrived in this phase published
    before: Array | None = None  # the same of all phases that have ended
    waiting: list[Array] = field(default_factory=list)


@dataclass
class Incoming:
    """A copy to shared memory under way."""

    lane: int
    map: TensorMap
    at: tuple[int, ...]
    words: Array
    barrier: CountingBarrier


@dataclass
class Outgoing:
    """A copy to global memory under way, in a group of the thread that started it."""

    lane: int
    group: int
    map: TensorMap
    at: tuple[int, ...]
    words: Array
    data: Array
    text: str


class Boxes:
    """Barriers, and copies under way."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.barriers: dict[tuple[int, int], CountingBarrier] = {}  # by block and address
        self.incoming: list[Incoming] = []
        self.outgoing: list[Outgoing] = []
        self.group = np.zeros(machine.num_lanes, np.int64)  # of stores, that each lane is filling
        machine.progress.append(self.complete_one)
        machine.at_end.append(self.check_end)

    def init(self, lane: int, address: int, count: int) -> None:
        machine = self.machine
        words = machine.shared.words(np.array([lane]), np.array([address]), 8)
        key = int(machine.lane_blocks[lane]), address
        if key in self.barriers or not 0 < count < TOO_MANY:
            raise FaultError(f"makes a barrier for {count} arrivals, or a second time", lane)
        machine.shared.begin_copy(np.array([lane]), words)
        slot = sum(block == key[0] for block, _ in self.barriers)
        if slot == NUM_AGENTS:
            raise FaultError(f"more than {NUM_AGENTS} barriers: not known here", lane)
        own = int(machine.order.own[lane])
        self.barriers[key] = CountingBarrier(count, machine.threads + slot, own, machine.step, pending=count)

    def find(self, lane: int, address: int) -> CountingBarrier:
        """The barrier at an address, of which the thread must know."""
        found = self.barriers.get((int(self.machine.lane_blocks[lane]), address))
        if found is None or self.machine.order.known[lane, found.owner] < found.made:
            raise FaultError(f"no barrier was made at shared address {address}, for all that this thread knows", lane)
        return found

    def publish_barriers(self, lanes: Array) -> None:
        """The barriers that these threads have made may be used by copies."""
        makers = {(int(self.machine.lane_blocks[x]), int(self.machine.order.own[x])) for x in lanes}
        for (block, _), barrier in self.barriers.items():
            if (block, barrier.owner) in makers and barrier.visible == NEVER:
                barrier.visible = self.machine.step

    def arrive(self, lane: int, barrier: CountingBarrier, num_bytes: int) -> None:
        barrier.bytes += num_bytes
        barrier.pending -= 1
        if barrier.pending < 0:
            raise FaultError(f"arrives at a barrier at which all {barrier.count} have arrived", lane)
        self._note(barrier, self.machine.order.published(np.array([lane]), self.machine.step))
        self.end_phase(barrier)

    def _note(self, barrier: CountingBarrier, published: Array) -> None:
        barrier.phase = published if barrier.phase is None else np.maximum(barrier.phase, published)

    def end_phase(self, barrier: CountingBarrier) -> None:
        """End the phase, if nothing is pending."""
        if barrier.pending or barrier.bytes or barrier.phase is None:
            return
        barrier.before = barrier.phase if barrier.before is None else np.maximum(barrier.before, barrier.phase)
        barrier.phase, barrier.pending, barrier.parity = None, barrier.count, 1 - barrier.parity
        for lanes in barrier.waiting:
            self.machine.waits[lanes] = False
        barrier.waiting.clear()

    # ---- copies

    def start_load(self, lane: int, to: int, tensor: TensorMap, at: tuple[int, ...], barrier: CountingBarrier) -> None:
        machine = self.machine
        check(np.array([machine.order.known[lane, barrier.owner] >= barrier.visible]), np.array([lane]),
              "a copy that counts at a barrier that was not made known to copies")  # fmt: skip
        words = self._words(lane, to, tensor)
        machine.shared.begin_copy(np.array([lane]), words[None])
        self.incoming.append(Incoming(lane, tensor, at, words, barrier))

    def complete_one(self) -> bool:
        """The oldest copy arrives; false if there is none."""
        if not self.incoming:
            return False
        copy, machine = self.incoming.pop(0), self.machine
        addresses, inside = _places(copy.map, copy.at)
        data = np.zeros((len(addresses), CHUNK_BYTES // WORD), np.uint32)
        data[inside] = machine.memory.load(
            np.full(int(inside.sum()), copy.lane), addresses[inside], np.dtype(np.uint32), CHUNK_BYTES // WORD
        )
        machine.step += 1
        machine.shared.complete(copy.words, data.reshape(-1), copy.barrier.agent, machine.step)
        machine.shared.visible[copy.words] = -1
        copy.barrier.bytes -= data.nbytes
        arrived = np.full(machine.order.known.shape[1], -1, np.int32)
        arrived[copy.barrier.agent] = machine.step
        self._note(copy.barrier, arrived)
        self.end_phase(copy.barrier)
        return True

    def start_store(self, lane: int, of: int, tensor: TensorMap, at: tuple[int, ...], text: str) -> None:
        words = self._words(lane, of, tensor)
        data = self.machine.shared.begin_reading(lane, words)
        self.outgoing.append(Outgoing(lane, int(self.group[lane]), tensor, at, words, data, text))

    def wait_for_stores(self, lane: int, keep: int) -> None:
        """The thread's stores have read shared memory, but for those of its last `keep` groups."""
        due = [x for x in self.outgoing if x.lane == lane and x.group < self.group[lane] - keep]
        for store in due:
            machine = self.machine
            addresses, inside = _places(store.map, store.at)
            values = store.data.reshape(len(addresses), -1)[inside]
            machine.memory.store(np.full(len(values), lane), addresses[inside], values)
            machine.shared.end_reading(store.words)
            machine.shared.note_read(lane, store.words, machine.step)
            self.outgoing.remove(store)

    def _words(self, lane: int, address: int, tensor: TensorMap) -> Array:
        """The words of a box in shared memory in the order of its elements, from the 128-byte swizzle."""
        if tensor.box[0] * 2 != ROW_BYTES or any(x != 1 for x in tensor.box[2:]):
            raise FaultError(f"a box of {tensor.box}: not known here", lane)
        if address % SWIZZLED_BYTES:
            raise FaultError(f"a box at shared address {address}, which is not a multiple of {SWIZZLED_BYTES}", lane)
        chunks = address + np.arange(0, tensor.box[1] * ROW_BYTES, CHUNK_BYTES)
        return self.machine.shared.words(np.full(len(chunks), lane), swizzled(chunks), CHUNK_BYTES).reshape(-1)

    def check_end(self) -> None:
        if self.outgoing:
            first = self.outgoing[0]
            raise FaultError(f"a thread ends while its copy may still read shared memory\n  {first.text}", first.lane)
        if self.incoming:
            raise FaultError("a thread ends while a copy is under way that nobody waits for", self.incoming[0].lane)


def swizzled(addresses: Array) -> Array:
    """Where what belongs to a shared address lies: chunks of 16 bytes, exchanged by the number of the row."""
    return addresses ^ (addresses // ROW_BYTES % 8 * CHUNK_BYTES)


def _places(tensor: TensorMap, at: tuple[int, ...]) -> tuple[Array, Array]:
    """Global addresses of a box's chunks of 16 bytes, and which of them lie inside the tensor."""
    column, row, *rest = at
    rows = row + np.repeat(np.arange(tensor.box[1]), ROW_BYTES // CHUNK_BYTES)
    columns = column + np.tile(np.arange(0, tensor.box[0], CHUNK_BYTES // 2), tensor.box[1])
    inside = (rows >= 0) & (rows < tensor.sizes[1]) & (columns >= 0) & (columns < tensor.sizes[0])
    inside &= all(0 <= x < size for x, size in zip(rest, tensor.sizes[2:], strict=True))
    first = sum(x * stride for x, stride in zip(rest, tensor.strides[2:], strict=True))
    return tensor.address + 2 * (first + rows * tensor.strides[1] + columns * tensor.strides[0]), inside


def boxes(machine: Machine) -> Boxes:
    found = machine.state.get("boxes") or Boxes(machine)
    machine.state["boxes"] = found
    assert isinstance(found, Boxes)
    return found


@instruction("mbarrier")
def counting_barrier(machine: Machine, said: Instruction) -> Action:
    at, here = boxes(machine), machine.decoding
    name = said.opcode.removeprefix("mbarrier.").replace(".shared::cta", "")
    if name == "init.b64":
        base, offset = machine.address(said.operands[0], "u32")
        count = machine.read_lanes(said.operands[1], "u32")

        def init(group: Group) -> None:
            for lane in group.lanes:
                at.init(int(lane), int(base[lane]) + offset, int(count[lane]))

        return init
    if name in ("arrive.b64", "arrive.expect_tx.b64") and said.operands[0] == Symbol("_"):
        base, offset = machine.address(said.operands[1], "u32")
        expected = machine.read_lanes(said.operands[2], "u32") if "expect_tx" in name else None

        def arrive(group: Group) -> None:
            for lane in group.lanes:
                barrier = at.find(int(lane), int(base[lane]) + offset)
                at.arrive(int(lane), barrier, 0 if expected is None else int(expected[lane]))

        return arrive
    if name != "try_wait.parity.b64":
        raise unknown(said)
    is_over = machine.target(said.operands[0], "pred")
    base, offset = machine.address(said.operands[1], "u32")
    parity = machine.read_lanes(said.operands[2], "u32")

    def wait(group: Group) -> None:
        """Those whose phase is not over come back when it is: waiting is what the instruction may do."""
        keys = (
            machine.lane_blocks[group.lanes] << 32 | base[group.lanes].astype(np.int64) << 1 | parity[group.lanes] & 1
        )
        for key in np.unique(keys):
            lanes = group.lanes[keys == key]
            for lane in lanes:
                barrier = at.find(int(lane), int(base[lane]) + offset)
            if barrier.parity != key & 1:
                if barrier.before is not None:
                    machine.order.learn(lanes, barrier.before)
                is_over[lanes] = True
            else:
                barrier.waiting.append(lanes)
                machine.waits[lanes] = True
                machine.pc[lanes] = here

    return wait


@instruction("fence")
def fence(machine: Machine, said: Instruction) -> Action:
    at = boxes(machine)
    if said.opcode == "fence.mbarrier_init.release.cluster":
        return lambda group: at.publish_barriers(group.lanes)
    if said.opcode not in ("fence.proxy.async.shared::cta", "fence.proxy.async"):
        raise unknown(said)

    def run(group: Group) -> None:
        at.publish_barriers(group.lanes)
        for block in np.unique(machine.lane_blocks[group.lanes]):
            machine.shared.publish(group.lanes[machine.lane_blocks[group.lanes] == block], machine.step)

    return run


def bulk_copy(machine: Machine, said: Instruction) -> Action:
    """The instructions that begin with cp.async.bulk."""
    at = boxes(machine)
    if said.opcode == "cp.async.bulk.commit_group":

        def commit(group: Group) -> None:
            at.group[group.lanes] += 1

        return commit
    if said.opcode in ("cp.async.bulk.wait_group.read", "cp.async.bulk.wait_group"):
        keep = is_immediate(said, 0)

        def wait(group: Group) -> None:
            for lane in group.lanes:
                at.wait_for_stores(int(lane), keep)

        return wait
    if not any(said.opcode in (LOAD.format(n), STORE.format(n)) for n in (2, 3, 4, 5)):
        raise unknown(said)
    is_load = "complete_tx" in said.opcode
    tensor, shared = (said.operands[1], said.operands[0]) if is_load else said.operands[:2]
    base, offset = machine.address(shared, "u32")
    maps, map_offset = machine.address(tensor, "u64")
    assert isinstance(tensor, Address)
    coordinates = [machine.read_lanes(x, "s32") for x in tensor.coordinates]
    barrier = machine.address(said.operands[2], "u32") if is_load else None

    def start(group: Group) -> None:
        for lane in map(int, group.lanes):
            found = _map(machine, lane, int(maps[lane]) + map_offset)
            place = tuple(int(x[lane]) for x in coordinates)
            if len(place) != len(found.sizes):
                raise FaultError(f"{len(place)} coordinates in a tensor of {len(found.sizes)} axes", lane)
            address = int(base[lane]) + offset
            if barrier is None:
                at.start_store(lane, address, found, place, str(said))
            else:
                at.start_load(lane, address, found, place, at.find(lane, int(barrier[0][lane]) + barrier[1]))

    return start


def _map(machine: Machine, lane: int, address: int) -> TensorMap:
    found = machine.launch.maps.get(address - GENERIC - PARAMS_BASE)
    if found is None:
        raise FaultError(f"no tensor map has the generic address {address:#x}", lane)
    return found


@instruction("setmaxnreg")
def set_registers(machine: Machine, said: Instruction) -> Action:
    """Checked is that all warpgroups together do not ask for more than there are."""
    if said.opcode not in ("setmaxnreg.dec.sync.aligned.u32", "setmaxnreg.inc.sync.aligned.u32"):
        raise unknown(said)
    count = is_immediate(said, 0)
    if count % 8 or not 24 <= count <= 256:
        raise PtxError("a number of registers that is not allowed")
    held = machine.state.setdefault("registers", {})
    assert isinstance(held, dict)

    def run(group: Group) -> None:
        lanes = whole_warps(group)
        for warp in np.unique(lanes // 32):
            held[int(warp)] = count
        for block in np.unique(machine.lane_blocks[lanes]):
            warps = range(block * machine.threads // 32, (block + 1) * machine.threads // 32)
            total = sum(held.get(w, 0) for w in warps) * 32
            if total > 65536:
                raise FaultError(f"{total} registers for a block, of 65536", int(lanes[0]))

    return run


@instruction("elect")
def elect(machine: Machine, said: Instruction) -> Action:
    if said.opcode != "elect.sync" or not isinstance(said.operands[0], Vector):
        raise unknown(said)
    leader, is_leader = (x if x != Symbol("_") else None for x in said.operands[0].items)
    assert is_leader is not None
    chosen = machine.target(is_leader, "pred")
    number = machine.target(leader, "b32") if leader is not None else None
    first = np.arange(machine.num_lanes) % 32 == 0

    def run(group: Group) -> None:
        whole_warps(group)
        put(chosen, first, group)
        if number is not None:
            put(number, np.uint32(0), group)

    return run
