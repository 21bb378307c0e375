"""tools/check_layout.py lets right layouts pass and stops three planted faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.testing import tool_environment

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # one script, on whatever cores are left


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("check") / "results.json"
    script = Path(__file__).with_name("planted_bugs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, env=tool_environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", ["right: TP2 PP2, sequence parallelism", "right: DP2"])
def test_a_right_layout_passes(layout: str, results: dict[str, dict[str, Any]]) -> None:
    print(results[layout]["output"])
    assert results[layout]["status"] == 0, results[layout]["output"]
    assert "20 steps" in results[layout]["output"] and "the layout is right" in results[layout]["output"]


@pytest.mark.parametrize("fault", ["QKV split", "gradient reduction", "dropped micro-batch"])
def test_a_planted_fault_is_no_launch(fault: str, results: dict[str, dict[str, Any]]) -> None:
    print(results[fault]["output"])
    assert results[fault]["status"] == 1, results[fault]["output"]
    assert "FAULT: loss of step" in results[fault]["output"]
    assert "FAULT: gradients of" in results[fault]["output"]
    assert "no launch" in results[fault]["output"]
