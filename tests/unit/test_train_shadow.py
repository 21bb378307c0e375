"""The BF16 shadow: compares without a trace, and does what the policy says."""

from __future__ import annotations

import json

import pytest

from megatron_ledom.testing import run_program

SCRIPT = """
import json, math
from argparse import Namespace
from types import SimpleNamespace
from megatron_ledom.checkpoint.model import start_one_rank
start_one_rank()
import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron_ledom.errors import PrecisionError
from megatron_ledom.train.shadow import SWITCHED, Shadow, bf16_arithmetic

config = SimpleNamespace(fp8="hybrid", fp8_param=None)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
model[0].config = model[1].config = config
found = {}

with bf16_arithmetic(model, None):
    found["inside"] = config.fp8
found["outside"] = config.fp8

def run(policy, gap, resumed=None, steps=1):
    config.fp8 = "hybrid"
    seen, events = [], []
    args = Namespace(shadow_every=2, shadow_tolerance=0.05, shadow_policy=policy, curr_iteration=0)
    shadow = Shadow(args, None, lambda *event: events.append(event), resumed)
    model.train()
    for args.curr_iteration in range(steps):
        for _ in range(2):  # micro-batches
            def loss():
                seen.append((config.fp8, float(torch.rand(()))))
                return torch.tensor(3.0)
            if shadow.before(model, loss):
                state = torch.get_rng_state()
                shadow.after(model, torch.tensor(3.0 + gap))
                assert torch.equal(state, torch.get_rng_state())
    return {"seen": [s for s, _ in seen], "random": [r for _, r in seen], "events": [e[:2] for e in events],
            "fp8": config.fp8, "switched": getattr(args, SWITCHED)}

before = torch.get_rng_state()
found["quiet"] = run("warn", 0.01, steps=5)
found["no trace"] = bool(torch.equal(before, torch.get_rng_state()))
found["warned"] = run("warn", -0.2, steps=3)
found["not a number"] = run("warn", math.nan)
found["switched"] = run("switch", 0.2, steps=5)
found["resumed"] = run("warn", 0.2, Namespace(**{SWITCHED: 40}), steps=3)
try:
    run("stop", 0.2)
except PrecisionError as error:
    found["stopped"] = str(error)
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    done = run_program(SCRIPT, tmp_path_factory.mktemp("shadow"))
    record: dict[str, object] = json.loads(done.stdout.split("FOUND ", 1)[1])
    assert "warning: shadow check at step 1: loss in FP8 2.8000, in BF16 3.0000: gap -0.2000 nats" in done.stderr
    return record


def test_the_shadow_turns_fp8_off_for_itself_alone_and_leaves_no_trace(found: dict[str, object]) -> None:
    assert (found["inside"], found["outside"]) == (None, "hybrid")
    assert found["quiet"]["seen"] == [None, None, None]  # type: ignore[index] - steps 1, 3 and 5, one micro-batch of each
    assert found["quiet"]["events"] == [["shadow", 1], ["shadow", 3], ["shadow", 5]]  # type: ignore[index]
    assert len(set(found["quiet"]["random"])) == 1 and found["no trace"] is True  # type: ignore[index]


def test_each_policy_does_what_it_says(found: dict[str, dict[str, object]]) -> None:
    assert found["warned"]["events"] == [["shadow breach", 1], ["shadow breach", 3]]
    assert found["warned"]["fp8"] == "hybrid" and found["warned"]["switched"] is None
    assert found["not a number"]["events"] == [["shadow breach", 1]]
    assert found["switched"]["events"] == [["shadow breach", 1], ["precision switch", 1]]
    assert found["switched"]["fp8"] is None and found["switched"]["switched"] == 1
    assert found["resumed"]["events"] == [] and found["resumed"]["fp8"] is None and found["resumed"]["switched"] == 40
    assert "stopped at step 1 by --shadow-policy stop" in str(found["stopped"])
    assert "Go on from the last checkpoint with --precision bf16" in str(found["stopped"])
