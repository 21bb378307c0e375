"""The machine: registers of all threads of a grid as rows of numpy, the program counters, barriers, and the run.

Threads that stand at the same instruction run it together, those that are least far first. That is one order of many;
what another order could do differently is found by `order` and `memory`, which know what is ordered and what is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx.memory import FaultError, GlobalMemory, ParamMemory, SharedMemory
from ptx.order import Array, Order
from ptx.program import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Operand,
    PtxError,
    Register,
    Symbol,
)

DTYPES = {"pred": np.bool_, "u8": np.uint8, "b8": np.uint8, "s8": np.int8, "u16": np.uint16, "b16": np.uint16,
          "s16": np.int16, "bf16": np.uint16, "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32,
          "u64": np.uint64, "b64": np.uint64, "s64": np.int64, "f64": np.float64}  # fmt: skip
LANES_AT_ONCE = 4096
MAX_STEPS = 300_000  # of one machine: our kernels need 30,000 at most
NUM_AGENTS = 32  # barriers that count bytes, of a block

Action = Callable[["Group"], None]
Decoder = Callable[["Machine", Instruction], Action]
INSTRUCTIONS: dict[str, Decoder] = {}
"""First word of an opcode -> what makes an action of an instruction."""

UNDEFINED = "reads register {}, which was never written"
IN_FLIGHT = "touches register {}, to which a product is under way"
HELD = "writes register {}, which a product under way still reads"
ENDS_SEGMENT = {"bra", "ret", "exit", "bar", "mbarrier", "barrier"}


def instruction(*names: str) -> Callable[[Decoder], Decoder]:
    """Declare the decoder of the instructions whose opcode begins with a word."""

    def note(decoder: Decoder) -> Decoder:
        for name in names:
            assert name not in INSTRUCTIONS, name
            INSTRUCTIONS[name] = decoder
        return decoder

    return note


class Group:
    """Lanes that run an instruction together."""

    def __init__(self, mask: Array) -> None:
        self.mask = mask
        self.lanes = np.flatnonzero(mask)


@dataclass(frozen=True)
class TensorMap:
    """A tensor of bf16 in global memory, its fastest axis first, and the box that a copy moves."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    box: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """What a launcher starts: `params` holds the bytes of each parameter."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    params: list[bytes]
    maps: dict[int, TensorMap] = field(default_factory=dict)  # offset in the first parameter -> what lies there


@dataclass
class Step:
    """A decoded instruction."""

    instruction: Instruction
    run: Action
    predicate: int | None  # a register
    is_negated: bool
    sources: list[int]
    targets: list[int]


@dataclass
class Barrier:
    """Of one block and one number: who has come."""

    expected: int
    arrived: int = 0
    waiting: list[Array] = field(default_factory=list)
    published: Array | None = None


def run_launch(module: Module, launch: Launch, memory: GlobalMemory, max_steps: int = MAX_STEPS) -> int:
    """Run a grid, some blocks at a time; returns how many instructions were run, each for many lanes.

    A part that has not ended after `max_steps` instructions is taken not to end at all.

    Raises:
        PtxError: a thread did what it must not, or an instruction is not known.
    """
    kernel = module.kernels[launch.kernel]
    x, y, z = launch.grid
    blocks = np.stack(np.unravel_index(np.arange(x * y * z), (z, y, x)))[::-1].T  # x is the fastest
    at_once = max(1, LANES_AT_ONCE // launch.threads)
    steps = 0
    for start in range(0, len(blocks), at_once):
        machine = Machine(module, kernel, launch, memory, blocks[start : start + at_once])
        machine.run(max_steps)
        steps += machine.step
    return steps


class Machine:
    """Some blocks of a grid."""

    def __init__(self, module: Module, kernel: Kernel, launch: Launch, memory: GlobalMemory, blocks: Array) -> None:
        sizes = [len(x) for x in launch.params]
        if sizes != [size for _, size in kernel.params]:
            raise PtxError(f"{kernel.name}: parameters of {sizes} bytes, the PTX asks for {kernel.params}")
        if kernel.max_threads is not None and launch.threads > kernel.max_threads:
            raise PtxError(f"{kernel.name}: {launch.threads} threads, the PTX allows {kernel.max_threads}")
        if launch.threads % 32:
            raise PtxError(f"{kernel.name}: a block of {launch.threads} threads is not made of warps")
        self.module, self.kernel, self.launch, self.memory, self.blocks = module, kernel, launch, memory, blocks
        self.threads, self.num_lanes = launch.threads, launch.threads * len(blocks)
        self.lane_blocks = np.repeat(np.arange(len(blocks)), self.threads)
        self.params = ParamMemory([(name, data) for (name, _), data in zip(kernel.params, launch.params, strict=True)])
        self.symbols, shared_bytes = self._place_variables(launch.shared_bytes)
        is_hopper = module.target >= "sm_90"
        self.order = Order(len(blocks), self.threads, NUM_AGENTS if is_hopper else 0)
        self.shared = SharedMemory(shared_bytes, len(blocks), self.order, self.lane_blocks)
        self.registers = [np.zeros(self.num_lanes, DTYPES[kind]) for _, kind in kernel.registers]
        everyone = np.ones(self.num_lanes, bool)
        # Registers, and the lanes that must not read them, or neither read nor write, or not write. Never in place.
        self.changed: list[Array] | None = None  # at which step each register was written, if somebody asks for it
        self.undefined: dict[int, Array] = dict.fromkeys(range(len(self.registers)), everyone)
        self.in_flight: dict[int, Array] = {}
        self.held: dict[int, Array] = {}
        self.barriers: dict[int, Barrier] = {}  # 16 of each block
        self.special = self._special_registers()
        self.step = 0
        self.pc = np.zeros(self.num_lanes, np.int64)
        self.waits = np.zeros(self.num_lanes, bool)
        self.at_end: list[Callable[[], None]] = []  # checks
        self.state: dict[str, object] = {}  # of families of instructions
        self.progress: list[Callable[[], bool]] = []  # what can complete when all threads wait
        self.end = len(kernel.instructions)
        self.current: tuple[list[int], list[int]] = ([], [])
        self.decoding = 0  # the number of the instruction that is being decoded
        self.steps = [self._decode(i, x) for i, x in enumerate(kernel.instructions)]
        self.segment_end = self._segments()

    # ---- decoding

    def read(self, operand: Operand, kind: str, is_wider_allowed: bool = False) -> Array:
        """The operand as numbers of a type: a row of all lanes that follows the register, or a single number."""
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Register):
            row = self.registers[operand.index]
            self.current[0].append(operand.index)
            if operand.is_negated:
                raise PtxError("a negated predicate as an operand is not known here")
            if row.dtype.itemsize == dtype.itemsize and (row.dtype == np.bool_) == (dtype == np.bool_):
                return row.view(dtype)
            if is_wider_allowed and row.dtype.itemsize > dtype.itemsize:
                return row.view(dtype)[:: row.dtype.itemsize // dtype.itemsize]  # little endian: the lowest part
            raise PtxError(f"register {self.kernel.registers[operand.index]} as an operand of type {kind}")
        if isinstance(operand, Immediate):
            return _number(operand.text, dtype)
        if isinstance(operand, Symbol):
            if operand.name in self.special:
                return self.special[operand.name].astype(dtype)
            if operand.name in self.symbols:
                return np.array(self.symbols[operand.name]).astype(dtype)
        raise PtxError(f"{operand} as an operand of type {kind}")

    def read_lanes(self, operand: Operand, kind: str, is_wider_allowed: bool = False) -> Array:
        """The same, always a row."""
        return np.broadcast_to(self.read(operand, kind, is_wider_allowed), self.num_lanes)

    def target(self, operand: Operand, kind: str, is_wider_allowed: bool = False) -> Array:
        """The row of a register that an instruction writes as numbers of a type."""
        if not isinstance(operand, Register) or operand.is_negated:
            raise PtxError(f"{operand} as a result")
        row = self.registers[operand.index]
        dtype = np.dtype(DTYPES[kind])
        self.current[1].append(operand.index)
        if row.dtype.itemsize == dtype.itemsize and (row.dtype == np.bool_) == (dtype == np.bool_):
            return row.view(dtype)
        if is_wider_allowed and row.dtype.itemsize > dtype.itemsize and dtype.kind in "iu":
            return row.view(f"i{row.dtype.itemsize}" if dtype.kind == "i" else f"u{row.dtype.itemsize}")
        raise PtxError(f"register {self.kernel.registers[operand.index]} as a result of type {kind}")

    def address(self, operand: Operand, kind: str) -> tuple[Array, int]:
        """Base and offset of an address; kind is the type of the base."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} as an address")
        return self.read_lanes(operand.base, kind), operand.offset

    def _decode(self, number: int, said: Instruction) -> Step:
        self.current, self.decoding = ([], []), number
        decoder = INSTRUCTIONS.get(said.opcode.partition(".")[0])
        if decoder is None:
            raise PtxError(f"an instruction that is not known here: {said}")
        try:
            run = decoder(self, said)
        except PtxError as error:
            raise PtxError(f"{error}: {said}") from error
        predicate = said.predicate
        return Step(said, run, predicate and predicate.index, bool(predicate and predicate.is_negated), *self.current)

    def _segments(self) -> Array:
        """For each instruction, where the run of instructions without branch, label or wait that it is in ends."""
        starts = set(self.kernel.labels.values()) | {self.end}
        ends = np.empty(self.end, np.int64)
        end = self.end
        for at in range(self.end - 1, -1, -1):
            if at + 1 in starts or self.steps[at].instruction.opcode.partition(".")[0] in ENDS_SEGMENT:
                end = at + 1
            if self.steps[at].instruction.opcode.startswith("mbarrier"):
                starts.add(at)  # a thread may come back to it
            ends[at] = end
        return ends

    def _place_variables(self, dynamic_bytes: int) -> tuple[dict[str, int], int]:
        """Addresses of variables and parameters, and the bytes of shared memory; the launch's part comes last."""
        symbols, at = dict(self.params.addresses), 0
        shared = [(name, v) for name, v in self.module.variables.items() if v.space == "shared"]
        for name, variable in sorted(shared, key=lambda x: x[1].size is None):
            at = -(-at // variable.align) * variable.align
            symbols[name] = at
            at += dynamic_bytes if variable.size is None else variable.size
        return symbols, max(at, dynamic_bytes)

    def _special_registers(self) -> dict[str, Array]:
        thread = np.tile(np.arange(self.threads, dtype=np.uint32), len(self.blocks))
        found = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32}
        for axis, name in enumerate("xyz"):
            found[f"%ctaid.{name}"] = self.blocks[self.lane_blocks, axis].astype(np.uint32)
            found[f"%nctaid.{name}"] = np.full(self.num_lanes, self.launch.grid[axis], np.uint32)
            found[f"%ntid.{name}"] = np.full(self.num_lanes, self.threads if axis == 0 else 1, np.uint32)
        return found | {f"%tid.{x}": np.zeros(self.num_lanes, np.uint32) for x in "yz"}

    # ---- running

    def run(self, max_steps: int) -> None:
        at = 0
        with np.errstate(all="ignore"):
            while self.step < max_steps:
                ready = ~self.waits & (self.pc < self.end)
                if ready.any():
                    at = int(self.pc[ready].min())
                    self._run_segment(at, ready & (self.pc == at))
                elif (self.pc == self.end).all():
                    break
                elif not any(complete() for complete in self.progress):
                    raise PtxError(self._deadlock())
            else:
                raise PtxError(f"no end after {max_steps} instructions: {self.kernel.instructions[at]}")
            if self.barriers:
                key, left = next(iter(self.barriers.items()))
                raise PtxError(f"all threads have ended, and {left.arrived} of {left.expected} have come to barrier "
                               f"{key % 16} of block {key // 16}")  # fmt: skip
            for check_end in self.at_end:
                try:
                    check_end()
                except FaultError as fault:
                    raise PtxError(f"{fault}{self._thread(fault.lane)}") from fault

    def _run_segment(self, at: int, mask: Array) -> None:
        end = int(self.segment_end[at])
        everyone = Group(mask)
        self.pc[mask] = end
        for step in self.steps[at:end]:
            self.step += 1
            group = everyone
            if step.predicate is not None:
                self._check_registers(step, [step.predicate], self.undefined, mask, UNDEFINED)
                group = Group(mask & (self.registers[step.predicate] ^ step.is_negated))
                if not len(group.lanes):
                    continue
            self._run_step(step, group)

    def _run_step(self, step: Step, group: Group) -> None:
        self._check_registers(step, step.sources, self.undefined, group.mask, UNDEFINED)
        if self.in_flight:
            self._check_registers(step, [*step.sources, *step.targets], self.in_flight, group.mask, IN_FLIGHT)
            self._check_registers(step, step.targets, self.held, group.mask, HELD)
        try:
            step.run(group)
        except FaultError as fault:
            raise PtxError(f"{fault}\n  {step.instruction}{self._thread(fault.lane)}") from fault
        for register in step.targets:
            if self.changed is not None:
                np.copyto(self.changed[register], self.step, where=group.mask)
            missing = self.undefined.get(register)
            if missing is not None:
                still = missing & ~group.mask
                if still.any():
                    self.undefined[register] = still
                else:
                    del self.undefined[register]

    def _check_registers(
        self, step: Step, registers: list[int], forbidden: dict[int, Array], mask: Array, what: str
    ) -> None:
        """May these lanes touch these registers? `forbidden` holds the lanes that must not."""
        for register in registers:
            lanes = forbidden.get(register)
            if lanes is not None and (lanes & mask).any():
                name = self.kernel.registers[register][0]
                where = self._thread(int(np.argmax(lanes & mask)))
                raise PtxError(f"{what.format(name)}\n  {step.instruction}{where}")

    def _thread(self, lane: int | None) -> str:
        if lane is None:
            return ""
        block = ", ".join(str(x) for x in self.blocks[self.lane_blocks[lane]])
        return f" [block {block}; thread {lane % self.threads}]"

    def _deadlock(self) -> str:
        places = []
        for at in np.unique(self.pc[self.waits]):
            lanes = np.flatnonzero(self.waits & (self.pc == at))
            before = max(at - 1, 0) if not self.kernel.instructions[at].opcode.startswith("mbarrier") else at
            places.append(
                f"{len(lanes)} threads wait at {self.kernel.instructions[before]}{self._thread(int(lanes[0]))}"
            )
        ended = int((self.pc == self.end).sum())
        return "deadlock: " + "\n  ".join([*places, f"{ended} threads have ended"])


def _number(text: str, dtype: np.dtype) -> Array:
    """An immediate as a number of a type; bit patterns of floating point numbers may serve as integers."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = np.array(int(text[2:], 16), np.uint32 if text[1] in "fF" else np.uint64)
        if dtype.itemsize != bits.dtype.itemsize:
            raise PtxError(f"{text} as a number of {dtype}")
        return bits.view(dtype)
    value = int(text, 0)
    if dtype == np.bool_:
        return np.array(bool(value))
    if dtype.kind == "f":
        raise PtxError(f"{text} as a number of {dtype}")
    return np.array(value % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
