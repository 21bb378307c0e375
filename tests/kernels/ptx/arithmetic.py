"""Arithmetic, comparisons, conversions, moves: what a thread does alone, in registers. PTX ISA 9.0, 9.7.1 to 9.7.9."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.machine import DTYPES, Action, Group, Machine, instruction
from ptx.memory import GENERIC, FaultError
from ptx.order import Array
from ptx.program import WIDTHS, Immediate, Instruction, PtxError, Vector

INTEGERS = {"u16", "s16", "u32", "s32", "u64", "s64"}
BITS = {"b16", "b32", "b64", "pred"}
TWICE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def put(row: Array, values: Array, group: Group) -> None:
    """Write the group's lanes of a register."""
    np.copyto(row, values, where=group.mask, casting="same_kind")


def unknown(said: Instruction) -> PtxError:
    return PtxError("a form of this instruction that is not known here")


def kind_of(said: Instruction, *allowed: str, types: set[str]) -> str:
    """The type at the end of an opcode, all of whose words before it must be among `allowed`."""
    _, *words, kind = said.opcode.split(".")
    if kind not in types or not set(words) <= set(allowed):
        raise unknown(said)
    return kind


def simple(machine: Machine, said: Instruction, kind: str, compute: Callable[..., Array]) -> Action:
    """An instruction whose operands and result have one type."""
    target = machine.target(said.operands[0], kind)
    sources = [machine.read(x, kind) for x in said.operands[1:]]
    return lambda group: put(target, compute(*sources), group)


@instruction("add", "sub")
def add(machine: Machine, said: Instruction) -> Action:
    kind = kind_of(said, "rn", types=INTEGERS | {"f32", "f64"})
    return simple(machine, said, kind, np.add if said.opcode.startswith("add") else np.subtract)


@instruction("mul", "mad")
def multiply(machine: Machine, said: Instruction) -> Action:
    name, *words = said.opcode.split(".")
    if words[-1] in ("f32", "f64") and name == "mul":
        return simple(machine, said, kind_of(said, "rn", types={"f32", "f64"}), np.multiply)
    if len(words) != 2 or words[1] not in INTEGERS or words[0] not in ("lo", "hi", "wide"):
        raise unknown(said)
    kind, result = words[1], TWICE[words[1]] if words[0] == "wide" else words[1]
    if words[0] == "hi" and kind not in ("u32", "s32"):
        raise unknown(said)
    wide = np.dtype(DTYPES[result if words[0] == "wide" else TWICE.get(kind, kind)])
    target, a, b = machine.target(said.operands[0], result), *(machine.read(x, kind) for x in said.operands[1:3])
    c = machine.read(said.operands[3], result) if name == "mad" else None

    def run(group: Group) -> None:
        product = a.astype(wide) * b.astype(wide)
        if words[0] == "hi":
            product = product >> wide.type(32)
        product = product.astype(target.dtype)
        put(target, product if c is None else product + c, group)

    return run


@instruction("fma")
def fused_multiply_add(machine: Machine, said: Instruction) -> Action:
    """Through float64, where the product is exact; the sum is rounded twice, which can differ in the last bit."""
    kind_of(said, "rn", types={"f32"})
    return simple(machine, said, "f32", lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32))


@instruction("div", "rem")
def divide(machine: Machine, said: Instruction) -> Action:
    kind = said.opcode.split(".")[-1]
    if kind == "f32" and said.opcode in ("div.rn.f32", "div.full.f32", "div.approx.f32"):
        return simple(machine, said, kind, np.divide)
    kind = kind_of(said, types=INTEGERS)
    target, (a, b) = machine.target(said.operands[0], kind), (machine.read_lanes(x, kind) for x in said.operands[1:])
    is_division = said.opcode.startswith("div")

    def run(group: Group) -> None:
        by = b[group.lanes].astype(object if kind == "u64" else np.int64)
        if (by == 0).any():
            raise FaultError("divides by zero", int(group.lanes[np.argmax(by == 0)]))
        of = a[group.lanes].astype(by.dtype)
        quotient = abs(of) // abs(by) * np.where((of < 0) == (by < 0), 1, -1)  # towards zero
        target[group.lanes] = quotient if is_division else of - quotient * by

    return run


@instruction("neg", "abs", "not")
def unary(machine: Machine, said: Instruction) -> Action:
    name = said.opcode.partition(".")[0]
    kind = kind_of(said, types=BITS if name == "not" else INTEGERS | {"f32"})
    return simple(machine, said, kind, {"neg": np.negative, "abs": np.abs, "not": np.invert}[name])


@instruction("and", "or", "xor")
def bitwise(machine: Machine, said: Instruction) -> Action:
    name = said.opcode.partition(".")[0]
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    return simple(machine, said, kind_of(said, types=BITS), function)


@instruction("shl", "shr")
def shift(machine: Machine, said: Instruction) -> Action:
    """Shifts by the width or more give 0, or the sign."""
    kind = kind_of(said, types=(BITS | INTEGERS) - {"pred"})
    target, value = machine.target(said.operands[0], kind), machine.read(said.operands[1], kind)
    by, bits = machine.read(said.operands[2], "u32"), 8 * WIDTHS[kind]
    function = np.left_shift if said.opcode.startswith("shl") else np.right_shift
    of_all = 0 if function is np.left_shift or kind[0] != "s" else None

    def run(group: Group) -> None:
        amount = np.minimum(by, bits - 1).astype(target.dtype)
        shifted = function(value, amount)
        if (by >= bits).any():
            shifted = np.where(by < bits, shifted, function(shifted, target.dtype.type(1)) if of_all is None else 0)
        put(target, shifted.astype(target.dtype), group)

    return run


@instruction("min", "max")
def extreme(machine: Machine, said: Instruction) -> Action:
    """Of floating point numbers, that which is not NaN."""
    kind = kind_of(said, types=INTEGERS | {"f32"})
    return simple(machine, said, kind, np.fmin if said.opcode.startswith("min") else np.fmax)


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@instruction("setp")
def compare(machine: Machine, said: Instruction) -> Action:
    _, name, *words, kind = said.opcode.split(".")
    is_unordered = name[-1] == "u" and kind == "f32"
    function = COMPARISONS.get(name[:-1] if is_unordered else name)
    if function is None or words or kind not in INTEGERS | {"f32", "b16", "b32", "b64"}:
        raise unknown(said)
    target = machine.target(said.operands[0], "pred")
    a, b = (machine.read(x, kind) for x in said.operands[1:])

    def run(group: Group) -> None:
        found = function(a, b)
        if kind == "f32":  # numpy says that NaN differs from all; so does PTX only if asked for
            is_nan = np.isnan(a) | np.isnan(b)
            found = found | is_nan if is_unordered else found & ~is_nan
        put(target, found, group)

    return run


@instruction("selp")
def select(machine: Machine, said: Instruction) -> Action:
    kind = kind_of(said, types=INTEGERS | BITS - {"pred"} | {"f32", "f64"})
    target, a, b = machine.target(said.operands[0], kind), *(machine.read(x, kind) for x in said.operands[1:3])
    condition = machine.read(said.operands[3], "pred")
    return lambda group: put(target, np.where(condition, a, b), group)


@instruction("mov")
def move(machine: Machine, said: Instruction) -> Action:
    kind = kind_of(said, types=set(DTYPES) - {"b8", "u8", "s8"})
    to, value = said.operands
    if isinstance(to, Vector) == isinstance(value, Vector):
        if isinstance(to, Vector):
            raise unknown(said)
        return simple(machine, said, kind, lambda x: x)
    # A wide register from narrow ones, or the reverse; the first is the lowest part.
    parts = (to if isinstance(to, Vector) else value).items
    narrow = f"b{8 * WIDTHS[kind] // len(parts)}"
    if isinstance(to, Vector):
        whole = machine.read_lanes(value, kind)
        targets = [machine.target(x, narrow) for x in parts]

        def split(group: Group) -> None:
            pieces = np.ascontiguousarray(whole).view(targets[0].dtype).reshape(-1, len(targets))
            for i, target in enumerate(targets):
                put(target, pieces[:, i], group)

        return split
    target = machine.target(to, kind)
    sources = [machine.read_lanes(x, narrow) for x in parts]
    return lambda group: put(target, np.stack(sources, axis=1).view(target.dtype)[:, 0], group)


@instruction("cvta")
def to_space(machine: Machine, said: Instruction) -> Action:
    """Generic addresses of global memory are the same numbers, those of parameters are others."""
    if said.opcode == "cvta.param.u64":
        return simple(machine, said, "u64", lambda x: x + np.uint64(GENERIC))
    if said.opcode not in ("cvta.to.global.u64", "cvta.global.u64"):
        raise unknown(said)
    return simple(machine, said, "u64", lambda x: x)


def bf16_of(x: Array) -> Array:
    """float32 -> the bits of bf16, rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint32)


@instruction("cvt")
def convert(machine: Machine, said: Instruction) -> Action:
    _, *rounding, to, of = said.opcode.split(".")
    operands = said.operands
    if said.opcode == "cvt.rn.bf16x2.f32":  # the first source becomes the upper half
        target = machine.target(operands[0], "b32")
        high, low = (machine.read(x, "f32") for x in operands[1:])
        return lambda group: put(target, bf16_of(high) << np.uint32(16) | bf16_of(low), group)
    if said.opcode == "cvt.rn.bf16.f32":
        target, value = machine.target(operands[0], "b16"), machine.read(operands[1], "f32")
        return lambda group: put(target, bf16_of(value).astype(np.uint16), group)
    if said.opcode == "cvt.f32.bf16":
        target, value = machine.target(operands[0], "f32"), machine.read(operands[1], "b16")
        return lambda group: put(target, (value.astype(np.uint32) << np.uint32(16)).view(np.float32), group)
    whole = INTEGERS | {"u8", "s8"}
    is_known = (
        (to in whole and of in whole and not rounding)
        or (to == "f32" and of in INTEGERS and rounding == ["rn"])
        or (to in ("s32", "u32") and of == "f32" and rounding == ["rzi"])
    )
    if not is_known:
        raise unknown(said)
    target, value = machine.target(operands[0], to, True), machine.read(operands[1], of, True)
    narrow = np.dtype(DTYPES[to])
    limits = np.iinfo(narrow) if narrow.kind in "iu" else None

    def run(group: Group) -> None:
        found = value
        if of == "f32" and limits is not None:
            found = np.clip(np.trunc(np.nan_to_num(value.astype(np.float64), nan=0.0)), limits.min, limits.max)
        put(target, found.astype(narrow).astype(target.dtype), group)

    return run


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2.approx.ftz.f32": np.exp2,
    "ex2.approx.f32": np.exp2,
    "lg2.approx.ftz.f32": np.log2,
    "lg2.approx.f32": np.log2,
    "rcp.rn.f32": np.reciprocal,
    "rcp.approx.ftz.f32": np.reciprocal,
    "sqrt.rn.f32": np.sqrt,
}
"""Exact to a rounding, where the hardware may be off by a few."""


@instruction("ex2", "lg2", "rcp", "sqrt")
def function_of_one(machine: Machine, said: Instruction) -> Action:
    function = FUNCTIONS.get(said.opcode)
    if function is None:
        raise unknown(said)
    tiny = np.float32(np.finfo(np.float32).tiny)

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)

    if "ftz" in said.opcode:
        return simple(machine, said, "f32", lambda x: flush(function(flush(x))))
    return simple(machine, said, "f32", function)


def is_immediate(said: Instruction, place: int) -> int:
    """The number at a place of an instruction that wants it written in the text."""
    operand = said.operands[place]
    if not isinstance(operand, Immediate):
        raise PtxError(f"operand {place} is not a number")
    return int(operand.text, 0)
