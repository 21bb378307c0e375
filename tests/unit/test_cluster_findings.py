"""How a preflight judges: slow nodes, differing nodes, missing ranks, what the driver says of a GPU."""

from __future__ import annotations

import pytest

from megatron_ledom.cluster.findings import (
    PAIR,
    Finding,
    Level,
    Measurement,
    bad_nodes,
    check_least,
    compare_with_peers,
    exit_status,
    name_differing,
)
from megatron_ledom.cluster.gpus import FAULTS, NOTED, judge_health, parse
from megatron_ledom.cluster.storage import checkpoint_bytes
from megatron_ledom.cluster.together import find_behind


def gemm(**tflops: float) -> list[Measurement]:
    return [Measurement("GEMM", node, value, "TFLOP/s") for node, value in tflops.items()]


def test_the_slow_node_is_named_by_its_slowest_rank() -> None:
    measured = gemm(a=700, b=690, c=710, d=705) + gemm(b=610)
    (finding,) = compare_with_peers(measured, 0.1)
    assert (finding.level, finding.node) == (Level.BAD, "b")
    assert "610 TFLOP/s, 13 % below the median of 4 nodes" in finding.text
    (fine,) = compare_with_peers(measured, 0.15)
    assert fine.level is Level.OK
    assert fine.text == "610 to 710 TFLOP/s on 4 nodes"


def test_one_node_is_not_compared() -> None:
    (finding,) = compare_with_peers(gemm(a=1) + gemm(a=100), 0.1)
    assert finding.level is Level.OK
    assert "no peer to compare it with" in finding.text


def test_of_pairs_the_common_node_is_named_and_not_its_partners() -> None:
    links = {("a", "b"): 40.0, ("b", "c"): 12.0, ("c", "d"): 11.0, ("d", "a"): 41.0}  # c is slow
    measured = [Measurement(PAIR, node, speed, "GB/s") for pair, speed in links.items() for node in pair]
    assert bad_nodes(compare_with_peers(measured, 0.25)) == ["c"]


def test_a_speed_that_is_known_from_elsewhere() -> None:
    assert check_least(gemm(a=500), "GEMM", None) == []
    assert bad_nodes(check_least(gemm(a=500, b=650), "GEMM", 600)) == ["a"]


def test_the_node_that_differs_from_most_is_named() -> None:
    found = name_differing(
        "versions",
        [("a", "torch 2.13"), ("b", "torch 2.12"), ("b", "torch 2.12"), ("c", "torch 2.13")] * 2
        + [("a", "torch 2.13")],
    )
    assert [(f.node, f.text) for f in found] == [("b", "torch 2.12; most ranks have torch 2.13")]
    assert name_differing("versions", [("a", "x"), ("b", "x")]) == [Finding("versions", Level.OK, "x")]


@pytest.mark.parametrize(
    ("nodes", "status"),
    [([], 0), (["b"], 3), ([None], 2), (["b", None], 2)],
)
def test_the_status_says_whether_other_nodes_would_help(nodes: list[str | None], status: int) -> None:
    findings = [Finding("x", Level.BAD, "", node) for node in nodes]
    assert exit_status([*findings, Finding("x", Level.NOTE, "", "a")]) == status


def test_who_is_behind() -> None:
    stuck = find_behind([(4, "a"), (3, "b"), (4, "c")], [])
    assert [(f.node, "rank 1 is stuck in 'exchange'" in f.text) for f in stuck] == [("b", True)]
    (missing,) = find_behind([(1, "a"), None, (1, "a")], [])
    assert missing.node is None
    assert "ranks [1] never started" in missing.text
    (all_of_them,) = find_behind([(4, "a"), (4, "b")], [])
    assert all_of_them.node is None
    assert "all ranks are stuck in 'collectives'" in all_of_them.text
    (gone,) = find_behind([(4, "a"), (4, "b")], [1])
    assert (gone.node, gone.text) == ("b", "rank 1 gives no sign of life since 'collectives'")


def test_health_as_the_driver_reports_it() -> None:
    gpus = parse(NOTED, "NVIDIA H100 80GB HBM3, 550.54.15, 34, 4\nNVIDIA H100 80GB HBM3, 550.54.15, 71, 23011\n")
    sound = {field: [good[0].title()] * 2 for field, (good, _) in FAULTS.items()}
    fine = judge_health("n1", [gpus[0]] * 2, sound)
    assert [f.level for f in fine] == [Level.OK]
    assert "2 x NVIDIA H100 80GB HBM3, driver 550.54.15" in fine[0].text
    values = sound | {"ecc.errors.uncorrected.volatile.total": ["0", "2"], "remapped_rows.pending": ["[N/A]"] * 2}
    found = judge_health("n1", gpus, values)
    assert bad_nodes(found) == ["n1"]
    texts = [f.text for f in found if f.level is Level.BAD]
    assert len(texts) == 2
    assert "GPU 1: 23011 MiB in use before the job" in texts[0]
    assert "GPU 1: ecc.errors.uncorrected.volatile.total is 2" in texts[1]
    (unknown,) = [f for f in found if f.level is Level.UNKNOWN]
    assert "remapped_rows.pending" in unknown.text


def test_a_checkpoint_of_the_7b_takes_a_hundred_gigabytes() -> None:
    assert checkpoint_bytes("7b") == pytest.approx(109e9, rel=0.01)
