"""Two ranks take the same path where one has a wrong kernel: the emulated sm_80 kernels, there without a barrier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from emulation import Emulation
from synchronisation import synchronisations

from megatron_ledom.testing import tool_environment

BARRIER = ("forward.h", "__syncthreads")
RANKS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from megatron_ledom.ops.conformance import judge_all
from megatron_ledom.ops.kernels import Variant
from megatron_ledom.ops.path import choose_among
from megatron_ledom.ops.trust import Trust, Use, check_problems

sys.path.insert(0, sys.argv[4])
from emulation import Run, load_library

rank, folder, faulty_line = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
emulation = load_library(Path(sys.argv[5]))
run = Run(removed=("forward.h", faulty_line) if rank == 1 else None)

def check(use):
    if use.part != "sm80":
        return None
    def both(p):
        o, lse = emulation.forward(*p.inputs, p.mask, run)
        return o, lse, *emulation.backward(p.inputs, p.mask, (o, lse), p.d_o, Run())
    verdict = judge_all(check_problems(use, torch.device("cpu")), both)
    return "; ".join(verdict.faults) or None

trust = Trust(lambda part: None, lambda part: "not verified" if (part, rank) == ("sm90a", 0) else None, check)
uses = [Use(part, torch.bfloat16, 64, "reversed") for part in ("sm90a", "sm80", "sm70")]
trust.agree(uses)
variants = [Variant(use.part, 70, 129) for use in uses]
print(rank, choose_among(variants, uses, 90, trust))
dist.destroy_process_group()
"""


def test_ranks_agree_where_one_has_a_wrong_kernel(emulation: Emulation, tmp_path: Path) -> None:
    """Rank 0 has not verified sm90a; on rank 1 the emulated sm_80 kernel lacks a barrier: both take the third."""
    barrier = next(line for (file, line), what in synchronisations().items() if (file, what) == BARRIER)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    words = [str(tmp_path), str(barrier), str(Path(__file__).parent), emulation.library._name]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tool_environment(),
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in ranks]
    print(outputs)
    for rank, (out, err) in enumerate(outputs):
        assert ranks[rank].returncode == 0, err
        assert f"{rank} Path(name='sm70'" in out, out + err
    assert "failed on another rank" in outputs[0][1] and "not verified on another rank" in outputs[1][1]
    assert "NOT USED, the check at first use failed: " in outputs[1][1]
