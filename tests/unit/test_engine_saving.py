"""Saves in the background, and an allocator setting that keeps them from ending."""

from __future__ import annotations

import os
import subprocess

import pytest

from megatron_ledom.engine.saving import background_save_risk
from megatron_ledom.testing import REPOSITORY

GROWING = "expandable_segments:True"


@pytest.mark.parametrize(
    ("device", "is_async", "environment", "is_risky"),
    [
        ("cuda", True, {"PYTORCH_CUDA_ALLOC_CONF": GROWING}, True),
        ("cuda", True, {"PYTORCH_ALLOC_CONF": f"max_split_size_mb:64, {GROWING.lower()}"}, True),
        ("cuda", False, {"PYTORCH_CUDA_ALLOC_CONF": GROWING}, False),
        ("cpu", True, {"PYTORCH_CUDA_ALLOC_CONF": GROWING}, False),
        ("cuda", True, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ("cuda", True, {}, False),
    ],
)
def test_saves_in_the_background_are_warned_of_growing_segments(
    device: str, is_async: bool, environment: dict[str, str], is_risky: bool
) -> None:
    said = background_save_risk(device, is_async, environment)
    assert (said is not None) is is_risky
    assert said is None or ("the first save never ends" in said and "--no-async-save" in said)


def test_the_scripts_do_not_set_what_the_trainer_warns_of() -> None:
    code = '. examples/slurm/cluster.env; echo "${PYTORCH_CUDA_ALLOC_CONF-unset} $NVTE_BWD_LAYERNORM_SM_MARGIN"'
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTORCH", "NVTE"))}
    environment["LEDOM_HOME"] = str(REPOSITORY)
    done = subprocess.run(
        ["bash", "-euc", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "unset 16\n"
