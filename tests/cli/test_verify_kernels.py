"""`tools/verify_kernels.py` where there is nothing to verify."""

from __future__ import annotations

import subprocess
import sys

from megatron_ledom.testing import REPOSITORY, tool_environment


def test_without_a_gpu_it_says_what_is_missing() -> None:
    env = tool_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(REPOSITORY / "tools/verify_kernels.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith(("error: no GPU: torch sees none", "error: nothing to verify: kernels:"))
    assert "CUDA kernels: " in done.stderr
    bad = subprocess.run([*command, "--limit-s", "soon"], capture_output=True, text=True, env=env, check=False)
    assert bad.returncode == 2 and "invalid float value: 'soon'" in bad.stderr
