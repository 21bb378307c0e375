"""What a check found, and what follows from all of them: the nodes to leave out, and the exit status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"
    UNKNOWN = "not checked"
    BAD = "bad"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at, e.g. "GPU health".
        level: how it came out.
        text: what was found, and what to do where something is wrong.
        node: whose fault it is, where leaving one node out would help.
    """

    check: str
    level: Level
    text: str
    node: str | None = None

    def line(self) -> str:
        """The finding as it is printed."""
        where = f" [{self.node}]" if self.node else ""
        return f"{self.level:<11} {self.check}{where}: {self.text}"


@dataclass(frozen=True)
class Measurement:
    """A speed that can be compared between nodes; more is better.

    Attributes:
        check: what was measured, e.g. "GEMM".
        node: where. Both nodes of a pair measure the pair.
        value: in `unit`.
        unit: of `value`.
    """

    check: str
    node: str
    value: float
    unit: str


PAIR = "all-reduce with a neighbour"


def compare_with_peers(measurements: Iterable[Measurement], tolerance: float) -> list[Finding]:
    """Name the nodes that are slower than the others.

    A node counts with its slowest value of a check, as a step waits for the slowest rank; of pairs,
    with its faster one, because the partner of the other may be the slow node.

    Args:
        measurements: of every rank and node.
        tolerance: a node is bad where it falls behind the median of all nodes by more than this share.
    """
    by_check: dict[str, list[Measurement]] = {}
    for each in measurements:
        by_check.setdefault(each.check, []).append(each)
    findings = []
    for check, found in by_check.items():
        of_node: dict[str, list[float]] = {}
        for each in found:
            of_node.setdefault(each.node, []).append(each.value)
        values = {node: max(speeds) if check == PAIR else min(speeds) for node, speeds in of_node.items()}
        unit, middle = found[0].unit, median(values.values())
        spread = f"{min(values.values()):.4g} to {max(values.values()):.4g} {unit}"
        slow = {node: value for node, value in values.items() if value < (1 - tolerance) * middle}
        for node, value in slow.items():
            text = f"{value:.4g} {unit}, {100 * (1 - value / middle):.0f} % below the median of {len(values)} nodes"
            findings.append(Finding(check, Level.BAD, text, node))
        if len(values) == 1:
            findings.append(Finding(check, Level.OK, f"{spread}; one node, so no peer to compare it with"))
        elif not slow:
            findings.append(Finding(check, Level.OK, f"{spread} on {len(values)} nodes"))
    return findings


def check_least(measurements: Iterable[Measurement], check: str, least: float | None) -> list[Finding]:
    """Name the nodes that do not reach a speed that is known from elsewhere."""
    if least is None:
        return []
    slow = {m.node: m for m in measurements if m.check == check and m.value < least}
    return [
        Finding(check, Level.BAD, f"{m.value:.4g} {m.unit}, at least {least:g} is asked for", m.node)
        for m in slow.values()
    ]


def name_differing(check: str, values: Sequence[tuple[str, str]]) -> list[Finding]:
    """Name the nodes whose value is not that of most ranks.

    Args:
        check: what the values are.
        values: (node, value) of every rank.
    """
    found = [value for _, value in values]
    usual = max(sorted(set(found)), key=found.count)
    others = dict.fromkeys((node, value) for node, value in values if value != usual)
    if not others:
        return [Finding(check, Level.OK, usual)]
    return [Finding(check, Level.BAD, f"{value}; most ranks have {usual}", node) for node, value in others]


def bad_nodes(findings: Iterable[Finding]) -> list[str]:
    """The nodes to leave out, in order of their names."""
    return sorted({f.node for f in findings if f.level is Level.BAD and f.node})


def exit_status(findings: Iterable[Finding]) -> int:
    """0: nothing is bad; 2: something that other nodes would not mend; 3: bad nodes, and nothing else."""
    blamed = [f.node for f in findings if f.level is Level.BAD]
    if None in blamed:
        return 2
    return 3 if blamed else 0
