"""A plan's memory against the bytes of real training ranks: eight layouts, every component."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from measured_memory import LAYOUTS

from megatron_ledom.testing import tool_environment

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # one script, on whatever cores are left
BOUND = 0.05


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("memory") / "table.json"
    script = Path(__file__).with_name("measured_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, env=tool_environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_planned_rank_has_the_bytes_of_a_real_one(layout: str, table: dict[str, list[dict[str, Any]]]) -> None:
    assert {row["rank"] for row in table[layout]} == {0, LAYOUTS[layout][0] - 1}
    for row in table[layout]:
        measured, planned = dict(row["measured"]), row["planned"]
        for part in ("weights", "gradients", "optimizer"):
            assert planned[part] == pytest.approx(measured[part], rel=0.005), (part, row)
        allocator = measured.pop("allocator") / measured["activations"] - 1
        total = sum(planned.values()) / sum(measured.values()) - 1
        activations = planned["activations"] / measured["activations"] - 1
        print(
            f"{layout}, rank {row['rank']}: {sum(measured.values()):,} bytes measured, planned {100 * total:+.2f} %, "
            f"activations {100 * activations:+.2f} %; allocator {100 * allocator:+.2f} %"
        )
        assert allocator > -0.05, row
        assert allocator < 0.02 or LAYOUTS[layout][0] > 1, row  # of one rank the allocator sees every free
        assert abs(activations) < BOUND, row
        assert abs(total) < BOUND, row


def test_layouts_differ_where_they_should(table: dict[str, list[dict[str, Any]]]) -> None:
    """Else the comparison above would hold for a plan that ignores the layout."""
    first = {name: table[name][0]["measured"] for name in LAYOUTS}
    one = first["one rank"]
    assert first["TP2"]["weights"] < 0.6 * one["weights"]
    assert first["PP2"]["weights"] < 0.6 * one["weights"]
    assert first["DP2, distributed optimizer"]["optimizer"] < 0.6 * first["DP2, whole optimizer"]["optimizer"]
    recomputed, kept = first["TP2, sequence parallelism, all recomputed"], first["TP2"]
    assert recomputed["activations"] < 0.6 * kept["activations"]


@pytest.mark.parametrize(
    ("run", "allocated_mib", "peak_mib"),
    [
        ("H200, 2048, local attention", 34_253.30, 48_540.89),
        ("H200, 2048, fused attention", 34_015.30, 43_274.40),
        ("H200, 8192, fused attention", 34_073.30, 52_591.50),
    ],
)
def test_the_memory_of_runs_on_an_h200(
    run: str, allocated_mib: float, peak_mib: float, table: dict[str, list[dict[str, Any]]]
) -> None:
    """Megatron's logs of preset 2b with local layers: what is allocated between steps, and `max allocated`."""
    mib = 2**20
    laid = table[run][0]
    static = laid["weights"] + laid["gradients"] + laid["optimizer"]
    assert laid["num_parameters"] == 1_976_641_536
    assert static == 1_976_641_536 * 18  # 2 + 4 + 12 bytes; the logs' own count of "weight and optimizer"
    activations = laid["activations"] / mib
    print(
        f"{run}: static {static / mib:,.1f} MiB, activations {activations:,.1f} MiB, peak {peak_mib:,.1f} MiB measured"
    )
    assert static / mib == pytest.approx(allocated_mib, rel=0.01)
    assert activations == pytest.approx(peak_mib - allocated_mib, rel=0.05)
    assert static / mib + activations == pytest.approx(peak_mib, rel=0.02)
