"""Faults put into the text of a kernel: what is changed, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A pattern in the PTX and what takes its place; at every place that it has, or at the first and the last."""

    what: str
    pattern: str
    replacement: str
    is_everywhere: bool = False

    def apply(self, kernel: str) -> Iterator[tuple[int, str]]:
        """The mutated texts, each with the line that differs."""
        places = list(re.finditer(self.pattern, kernel, re.M))
        if not self.is_everywhere and len(places) > 2:
            places = [places[0], places[-1]]
        for place in places:
            changed = place.expand(self.replacement)
            assert changed != place[0], (self.what, place[0])
            yield kernel.count("\n", 0, place.start()) + 1, kernel[: place.start()] + changed + kernel[place.end() :]


def kernel_text(module: str, name: str) -> str:
    """The text of one kernel with what a module needs around it. Lines keep their numbers."""
    begin = module.index(f".visible .entry {name}(")
    end = module.index("\n}\n", begin) + 3
    first = module.index(".visible .entry ")
    files = "".join(re.findall(r"^\s*\.file.*\n", module, re.M))
    return module[:first] + "\n" * module.count("\n", first, begin) + module[begin:end] + files


# A register, a list of two or four of them.
R = r"%\w+"
AMPERE = (
    Mutation("transposition of a matrix load left out", r"(ldmatrix\S*)\.trans", r"\1"),
    Mutation("a matrix load transposed", r"(ldmatrix\S*\.x4)\.shared", r"\1.trans.shared"),
    Mutation("two registers of a matrix load exchanged", rf"(ldmatrix.*\{{{R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("halves of a bf16 pair exchanged", rf"(cvt\.rn\.bf16x2\.f32 {R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("two registers of a product's left side exchanged", rf"(mma\.sync.*?\}}, \{{{R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("the registers of a product's right side exchanged", rf"(mma\.sync.*?\}}, \{{.*?\}}, \{{)({R}), ({R})", r"\1\3, \2"),
    Mutation("layouts of a product exchanged", r"(mma\S*)\.row\.col", r"\1.col.row"),
    Mutation("shape of a product", r"(mma\S*)\.m16n8k16", r"\1.m16n8k8"),
    Mutation("a wait that lets one group run on", r"cp\.async\.wait_group 0", "cp.async.wait_group 1", True),
    Mutation("a group never closed", r"cp\.async\.commit_group;", "", True),
    Mutation("a block's barrier left out", r"bar\.sync.*;", "", True),
    Mutation("a warp's barrier left out", r"bar\.warp\.sync.*;", "", True),
    Mutation("a predicate negated", r"@(%p\d+) bra", r"@!\1 bra", True),
    Mutation("rows beyond the sequence copied too", r"selp\.b32 (\S+), 16, 0, .*;", r"mov.b32 \1, 16;"),
    Mutation("a comparison that takes the equal too", r"setp\.gt\.s32", "setp.ge.s32"),
    Mutation("a shuffle among other lanes", r"mov\.u32 (\S+), 2;", r"mov.u32 \1, 4;"),
    Mutation("operands of a subtraction exchanged", rf"(sub\.f32 {R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("a parameter 8 bytes further on", r"(ld\.param\.u64 .*param_0\+)96\]", r"\g<1>104]"),
    Mutation("a swizzle of other rows", r"(and\.b32 .*, )7;", r"\g<1>6;"),
    Mutation("a store 8 bytes further on", rf"(st\.global\.v4\.u32 \[{R})\+128", r"\1+136"),
    Mutation("a store 1 MiB further on", rf"(st\.global\.v4\.u32 \[{R})\+128", r"\1+1048704"),
    Mutation("a copy 2 bytes further on", rf"(cp\.async\.cg\S* \[{R}\], \[{R})\]", r"\1+2]"),
    Mutation("an instruction left out", r"cvta\.to\.global.*;", ""),
)
