"""Faults put into the text of a kernel: what is changed, and where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A pattern in the PTX and what takes its place, at `places` of all places that it has, the first among them."""

    what: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    places: int = 1

    def apply(self, kernel: str) -> Iterator[tuple[int, str]]:
        """The mutated texts, each with the line that differs."""
        found = list(re.finditer(self.pattern, kernel, re.M))
        for place in found[:: max(1, len(found) // self.places)][: self.places]:
            made = self.replacement
            changed = place.expand(made) if isinstance(made, str) else made(place)
            assert changed != place[0], (self.what, place[0])
            yield kernel.count("\n", 0, place.start()) + 1, kernel[: place.start()] + changed + kernel[place.end() :]


def kernel_text(module: str, name: str) -> str:
    """The text of one kernel with what a module needs around it. Lines keep their numbers."""
    begin = module.index(f".visible .entry {name}(")
    # Braces of inline assembly may stand alone in a line too.
    after = module.find(".visible .entry ", begin + 1)
    end = module.rindex("\n}\n", begin, after if after > 0 else module.index(".file", begin)) + 3
    first = module.index(".visible .entry ")
    files = "".join(re.findall(r"^\s*\.file.*\n", module, re.M))
    return module[:first] + "\n" * module.count("\n", first, begin) + module[begin:end] + files


R = r"%\w+"
ALL = 1000

COMMON = (
    Mutation("halves of a bf16 pair exchanged", rf"(cvt\.rn\.bf16x2\.f32 {R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("a block's barrier left out", r"bar\.sync\s+0;", "", ALL),
    Mutation("a warp's barrier left out", r"bar\.warp\.sync.*;", "", ALL),
    Mutation("a predicate negated", r"@(%p\d+) bra", r"@!\1 bra", 6),
    Mutation("a comparison that takes the equal too", r"setp\.gt\.s32", "setp.ge.s32"),
    Mutation("a shuffle among other lanes", r"(shfl\.sync\.bfly\.b32 .*?, .*?, ).*?,", r"\g<1>4,"),
    Mutation("a parameter 8 bytes further on", r"(ld\.param\.u64\s+\S+ \[\S+\+)(\d+)\]",
             lambda place: f"{place[1]}{int(place[2]) + 8}]"),
    Mutation("an instruction left out", r"cvta\.to\.global.*;", "", 2),
)  # fmt: skip
AMPERE = (
    *COMMON,
    Mutation("transposition of a matrix load left out", r"(ldmatrix\S*)\.trans", r"\1"),
    Mutation("a matrix load transposed", r"(ldmatrix\S*\.x4)\.shared", r"\1.trans.shared"),
    Mutation("two registers of a matrix load exchanged", rf"(ldmatrix.*\{{{R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("registers of a product's left side exchanged", rf"(mma\.sync.*?\}}, \{{{R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("registers of a product's right side exchanged",
             rf"(mma\.sync.*?\}}, \{{.*?\}}, \{{)({R}), ({R})", r"\1\3, \2"),
    Mutation("layouts of a product exchanged", r"(mma\S*)\.row\.col", r"\1.col.row"),
    Mutation("another shape of a product", r"(mma\S*)\.m16n8k16", r"\1.m16n8k8"),
    Mutation("a wait that lets one group run on", r"cp\.async\.wait_group 0", "cp.async.wait_group 1", ALL),
    Mutation("a group never closed", r"cp\.async\.commit_group;", "", ALL),
    Mutation("rows beyond the sequence copied too", r"selp\.b32\s+(\S+), 16, 0, .*;", r"mov.b32 \1, 16;"),
    Mutation("operands of a subtraction exchanged", rf"(sub\.f32\s+{R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("a swizzle of other rows", r"(and\.b32\s+\S+ \S+ )7;", r"\g<1>6;"),
    Mutation("a store 8 bytes further on", rf"(st\.global\.v4\.u32\s+\[{R})(\+?\d*)\]", r"\1+8]"),
    Mutation("a store 1 MiB further on", rf"(st\.global\.v4\.u32\s+\[{R})(\+?\d*)\]", r"\1+1048576]"),
    Mutation("a copy 2 bytes further on", rf"(cp\.async\.cg\S* \[{R}\], \[{R})\]", r"\1+2]"),
)  # fmt: skip
HOPPER = (
    Mutation("right side of a product turned", r"(wgmma\.mma.*, p, 1, 1, 0, )0;", r"\g<1>1;"),
    Mutation("right side of a product not turned", r"(wgmma\.mma.*\}, \{.*\}, %rd\d+, \w+, 1, 1, )1;", r"\g<1>0;"),
    Mutation("left side of a product turned", r"(wgmma\.mma.*, p, 1, 1, )0, 0;", r"\g<1>1, 0;"),
    Mutation("a sign of a product", r"(wgmma\.mma.*, p, 1, )1, 0, 0;", r"\g<1>-1, 0, 0;"),
    Mutation("products added to what was there", r"setp\.ne\.b32 p, (\S+), 0;", r"setp.eq.b32 p, \1, 0;"),
    Mutation("sides of a product exchanged", r"(wgmma\.mma.*\}, )(%rd\d+), (%rd\d+), p", r"\1\3, \2, p"),
    Mutation("registers of a product's left side exchanged",
             rf"(wgmma\.mma.*\}}, \{{{R}, )({R}), ({R})", r"\1\3, \2"),
    Mutation("accumulators exchanged", rf"(wgmma\.mma\S* \{{)({R}), ({R})", r"\1\3, \2"),
    Mutation("no fence before products", r"wgmma\.fence.*;", "", ALL),
    Mutation("a group of products never closed", r"wgmma\.commit_group.*;", "", ALL),
    Mutation("a wait that lets one more group of products run on", r"(wgmma\.wait_group\S*) 0", r"\1 1", ALL),
    Mutation("a wait that lets two groups of products run on", r"(wgmma\.wait_group\S*) 1", r"\1 2", ALL),
    Mutation("no wait for a barrier's phase", r"mbarrier\.try_wait.*;", "setp.eq.u32 p, 0, 0;", ALL),
    Mutation("the other phase waited for", r"(mbarrier\.try_wait.*\], )(%r\d+);",
             r"{ .reg .b32 q; xor.b32 q, \2, 1; \g<1>q; }"),
    Mutation("no arrival", r"mbarrier\.arrive\.shared.*;", "", ALL),
    Mutation("bytes not expected", r"mbarrier\.arrive\.expect_tx(\S*) _, (\S+), .*;", r"mbarrier.arrive\1 _, \2;", ALL),
    Mutation("fewer bytes expected", r"(mbarrier\.arrive\.expect_tx.*), %r\d+;", r"\1, 1024;", ALL),
    Mutation("a barrier for fewer arrivals", r"(mbarrier\.init\S* \[%r\d+\]), (%r\d+);", r"\1, 2;", 2),
    Mutation("new barriers not made known", r"fence\.(mbarrier_init|proxy).*;\n(\s*fence.*;)?", "", 1),
    Mutation("stores not made known to copies", r"^\s*fence\.proxy\.async.*;", "", ALL),
    Mutation("a named barrier left out", r"bar\.(sync|arrive) %r.*;", "", ALL),
    Mutation("a copy's coordinates exchanged",
             rf"(cp\.async\.bulk\.tensor.*\{{)({R}), ({R})", r"\1\3, \2", 2),
    Mutation("no wait for copies that go out", r"cp\.async\.bulk\.wait_group.*;", ""),
    Mutation("a group of copies that go out never closed", r"cp\.async\.bulk\.commit_group;", ""),
    Mutation("more registers than there are", r"(setmaxnreg\.inc\S*) \d+", r"\1 248"),
    Mutation("rows of an operand closer together", r"(or\.b64\s+\S+ \S+ )4611686293305294848",
             r"\g<1>4611686155866341376"),
    *COMMON,
)  # fmt: skip
