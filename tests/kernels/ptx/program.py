"""PTX text -> kernels as lists of instructions, each with its line in the PTX and in the CUDA source.

Source: PTX ISA 9.0, chapters 4 and 5. What is not understood is an error; only debugging sections are skipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
          "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
"""Bytes of a value of each type."""

LINE_DIRECTIVES = (".version", ".target", ".address_size", ".loc", ".file")


class PtxError(Exception):
    """The text, or what a thread does, is not allowed or not known; says where."""


@dataclass(frozen=True)
class Source:
    """A line of the CUDA source, and the line into which it was inlined, if any."""

    file: str
    line: int
    within: Source | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" in {self.within}" if self.within else "")


@dataclass(frozen=True)
class Register:
    index: int  # in Kernel.registers
    is_negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number as it is written: `0f...` and `0d...` are bit patterns of floating point numbers."""

    text: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a variable, a label or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or `a|b` of instructions with two results."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; of a tensor, `[base, {coordinates}]`."""

    base: Operand
    offset: int
    coordinates: tuple[Operand, ...] = ()


Operand = Register | Immediate | Symbol | Vector | Address


@dataclass
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None
    line: int  # in the PTX
    source: Source | None
    text: str

    @property
    def parts(self) -> list[str]:
        return re.split(r"\.|(?<=:):", self.opcode.replace("::", "__")) if self.opcode else []

    def __str__(self) -> str:
        place = f", from {self.source}" if self.source else ""
        return f"PTX line {self.line}: {self.text}{place}"


@dataclass
class Kernel:
    name: str
    registers: list[tuple[str, str]] = field(default_factory=list)  # name and type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> number of the instruction that it stands before
    params: list[tuple[str, int]] = field(default_factory=list)  # name and bytes
    max_threads: int | None = None


@dataclass
class Variable:
    """A variable of a state space; `size` is None where the launch decides it."""

    space: str
    align: int
    size: int | None


@dataclass
class Module:
    target: str = ""
    files: dict[int, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)


def parse(text: str) -> Module:
    """Read a PTX module.

    Raises:
        PtxError: something in it is not known.
    """
    reader = _Reader()
    lines = text.splitlines()
    # Instructions come before the table of files that they refer to.
    for line in lines:
        if found := re.match(r'\s*\.file\s+(\d+)\s+"([^"]*)"', line):
            reader.module.files[int(found[1])] = found[2].rpartition("/")[2]
    for statement, number in _statements(lines):
        reader.read(statement, number)
    if reader.scopes or not reader.module.kernels:
        raise PtxError("the PTX ends inside a kernel, or holds none")
    return reader.module


def _statements(lines: list[str]) -> list[tuple[str, int]]:
    """Statements without their `;`, labels with their `:`, and braces of scopes, each with its line."""
    found: list[tuple[str, int]] = []
    parts: list[str] = []
    start = 0

    def end() -> None:
        if text := " ".join("".join(parts).split()):
            found.append((text, start))
        parts.clear()

    depth = 0  # of braces within a statement
    for number, line in enumerate(lines, start=1):
        code = line.partition("//")[0].strip()
        if not parts and code.startswith(LINE_DIRECTIVES):
            found.append((code, number))
            continue
        for piece in re.findall(r'"[^"]*"|[;{}]|^[\w$%]+:(?!:)|[^;{}"]+', code):
            if not parts and not piece.strip():
                continue
            is_empty = not parts
            if is_empty:
                start = number
            if piece == ";":
                end()
            elif piece == "{" and (is_empty or parts[0].startswith((".visible", ".entry", ".section"))):
                end()
                found.append(("{", number))
            elif piece == "}" and depth == 0:
                end()
                found.append(("}", number))
            elif is_empty and re.fullmatch(r"[\w$%]+:", piece):
                found.append((piece, number))
            else:
                depth += (piece == "{") - (piece == "}")
                parts.append(piece)
        if parts:
            parts.append(" ")
    end()
    return found


class _Reader:
    """The statements so far."""

    def __init__(self) -> None:
        self.module = Module()
        self.kernel: Kernel | None = None
        self.scopes: list[dict[str, int | str]] = []  # of the kernel: names of registers and labels
        self.num_scopes = 0
        self.is_debugging = False  # inside a section for debuggers
        self.source: Source | None = None

    def read(self, text: str, line: int) -> None:
        if self.is_debugging:
            self.is_debugging = text != "}"
        elif text.startswith(".section"):
            self.is_debugging = True
        elif text.startswith(".loc"):
            self._locate(text)
        elif text.startswith(LINE_DIRECTIVES):
            if text.startswith(".target"):
                self.module.target = text.split()[1]
        elif re.match(r"(\.visible )?\.entry\b", text):
            self._begin_kernel(text)
        elif self.kernel is None:
            self._declare_variable(text, line)
        elif text == "{":
            self.scopes.append({})
            self.num_scopes += 1
        elif text == "}":
            self.scopes.pop()
            if not self.scopes:
                self._end_kernel()
        elif text.startswith(".reg"):
            self._declare_registers(text, line)
        elif text.startswith((".shared", ".local")):
            self._declare_variable(text, line)
        elif text.startswith(".pragma"):
            pass  # advice to ptxas
        elif text.endswith(":"):
            # A label inside a scope has a name of its own; it is looked up when the kernel is complete.
            self.scopes[-1][text[:-1]] = name = f"{text[:-1]}@{self.num_scopes}" if len(self.scopes) > 1 else text[:-1]
            self.kernel.labels[name] = len(self.kernel.instructions)
        else:
            self.kernel.instructions.append(self._instruction(text, line))

    def _locate(self, text: str) -> None:
        place = re.match(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?", text)
        if place is None:
            raise PtxError(f"cannot read {text!r}")
        within = Source(self._file(place[3]), int(place[4])) if place[3] else None
        self.source = Source(self._file(place[1]), int(place[2]), within)

    def _file(self, number: str) -> str:
        return self.module.files.get(int(number), f"file {number}")

    def _begin_kernel(self, text: str) -> None:
        head = re.match(r"(?:\.visible )?\.entry (\w+)\s*\((.*?)\)(.*)", text)
        if head is None:
            raise PtxError(f"cannot read the head of a kernel: {text!r}")
        self.kernel = Kernel(head[1])
        self.source = None
        for param in filter(None, (p.strip() for p in head[2].split(","))):
            declared = re.fullmatch(r"\.param (?:\.align \d+ )?\.(\w+) (\w+)(?:\[(\d+)\])?", param)
            if declared is None:
                raise PtxError(f"cannot read the parameter {param!r}")
            self.kernel.params.append((declared[2], WIDTHS[declared[1]] * int(declared[3] or 1)))
        if threads := re.search(r"\.(?:maxntid|reqntid) (\d+)(?:, (\d+), (\d+))?", head[3]):
            self.kernel.max_threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)

    def _end_kernel(self) -> None:
        assert self.kernel is not None
        self.module.kernels[self.kernel.name] = self.kernel
        self.kernel = None

    def _declare_registers(self, text: str, line: int) -> None:
        assert self.kernel is not None
        declared = re.fullmatch(r"\.reg \.(\w+) (.*)", text)
        if declared is None or declared[1] not in WIDTHS:
            raise PtxError(f"PTX line {line}: cannot read {text!r}")
        for names in declared[2].split(","):
            family = re.fullmatch(r"([\w%$]+)<(\d+)>", names.strip())
            for name in [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [names.strip()]:
                self.scopes[-1][name] = len(self.kernel.registers)
                self.kernel.registers.append((name, declared[1]))

    def _declare_variable(self, text: str, line: int) -> None:
        declared = re.fullmatch(
            r"(?:\.extern |\.visible )?\.(shared|local) (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d*)\])?", text
        )
        if declared is None:
            raise PtxError(f"PTX line {line}: cannot read {text!r}")
        width = WIDTHS[declared[3]]
        size = None if declared[5] == "" else width * int(declared[5] or 1)
        self.module.variables[declared[4]] = Variable(declared[1], int(declared[2] or width), size)

    def _instruction(self, text: str, line: int) -> Instruction:
        said = re.fullmatch(r"(?:@(!?)([\w%$]+) )?([a-z][\w.:]*)(.*)", text, re.S)
        if said is None:
            raise PtxError(f"PTX line {line}: cannot read {text!r}")
        predicate = None
        if said[2]:
            register = self._operand(said[2])
            if not isinstance(register, Register):
                raise PtxError(f"PTX line {line}: {said[2]} is not a register")
            predicate = Register(register.index, bool(said[1]))
        operands = tuple(self._operand(x) for x in _split(said[4], ","))
        return Instruction(said[3], operands, predicate, line, self.source, text)

    def _operand(self, text: str) -> Operand:
        if text.startswith("["):
            base, *coordinates = _split(text[1:-1], ",")
            name, plus, offset = base.partition("+")
            more = tuple(self._operand(x) for c in coordinates for x in _split(c.strip("{} "), ","))
            return Address(self._operand(name.strip()), int(offset, 0) if plus else 0, more)
        if text.startswith("{"):
            return Vector(tuple(self._operand(x) for x in _split(text[1:-1], ",")))
        if "|" in text:
            return Vector(tuple(self._operand(x) for x in text.split("|")))
        if text.startswith("!"):
            register = self._operand(text[1:])
            assert isinstance(register, Register), text
            return Register(register.index, True)
        for scope in reversed(self.scopes):
            found = scope.get(text)
            if isinstance(found, int):
                return Register(found)
            if isinstance(found, str):
                return Symbol(found)
        if re.fullmatch(r"-?\d+|-?0[xX][0-9a-fA-F]+|0[fFdD][0-9a-fA-F]+", text):
            return Immediate(text)
        # Inside a scope a label may be used before it is declared: `resolve` finds it.
        inner = f"{text}@{self.num_scopes}" if len(self.scopes) > 1 else text
        return Symbol(f"{inner}|{text}" if inner != text else text)


def resolve(kernel: Kernel, symbol: Symbol) -> int:
    """The number of the instruction that a label stands before."""
    for name in symbol.name.split("|"):
        if name in kernel.labels:
            return kernel.labels[name]
    raise PtxError(f"{kernel.name}: no label {symbol.name}")


def _split(text: str, separator: str) -> list[str]:
    """Split where no bracket is open."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == separator and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    return [x for x in [*found, text[start:].strip()] if x]
