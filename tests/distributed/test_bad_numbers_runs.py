"""NaN on one rank of two: both act alike, nothing is updated, the documents are named, a replay does the same again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer, Launch
from small_run import NARROW

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.train.bad_numbers import LEDGER
from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars

pytestmark = pytest.mark.distributed

STEP = 7
LENGTH = ["--train-iters", 12, "--save-interval", 4]
REFUSED = 2


class Runs:
    def __init__(self, server: ForkServer, data_arguments: list[object], folder: Path) -> None:
        self._server, self._data, self._folder = server, data_arguments, folder
        self._number = 0

    def launch(self, run: str, *arguments: object) -> tuple[Launch, list[int]]:
        self._number += 1
        log = self._folder / f"{self._number}.log"
        every = [*NARROW, *self._data, "--run-dir", self._folder / run, *arguments]
        launch = self._server.start(every, 2, log)
        return launch, launch.wait()


@pytest.fixture
def runs(fork_server: ForkServer, data_arguments: list[object], tmp_path: Path) -> Runs:
    return Runs(fork_server, data_arguments, tmp_path)


def read_ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_the_run_goes_on_without_the_batch_and_a_replay_does_the_same(policy: str, runs: Runs, tmp_path: Path) -> None:
    flags = [*LENGTH, "--bad-numbers", policy]
    launch, statuses = runs.launch("whole", *flags, "--inject-fault", f"nan@{STEP}:1")
    assert statuses == [0, 0], launch.text[-6000:]
    end = {"skip": "the batch is left out", "rollback": "back to step 4"}[policy]
    assert (
        f"bad numbers: step {STEP}: the loss not finite on rank 1 (gradient norm nan); not updated, {end}"
        in launch.text
    )
    (entry,) = read_ledger(tmp_path / "whole")
    assert (entry["step"], entry["samples"], entry["action"]) == (STEP, [24, 28], policy)
    # 4 samples a step over two ranks: the first micro-batch of rank 1 is the second sample
    assert entry["documents"] and all("sample 25)" in text and ", row " in text for text in entry["documents"])
    assert entry["documents"][0] in launch.text

    launch, statuses = runs.launch("killed", *flags, "--exit-interval", 4)
    assert statuses == [0, 0], launch.text[-6000:]
    launch, statuses = runs.launch("killed", *flags, "--inject-fault", f"nan@{STEP}:1", f"kill@{STEP + 1}:0")
    assert statuses[0] == -9 and Checkpoint.open(tmp_path / "killed" / "checkpoints").iteration == 4
    launch, statuses = runs.launch("killed", *flags)  # the fault does not come back, the action does
    assert statuses == [0, 0], launch.text[-6000:]
    assert f"step {STEP}: {policy} again, as before: the loss not finite on rank 1" in launch.text
    assert read_ledger(tmp_path / "killed") == [entry], "no second entry"

    losses = [read_scalars(tmp_path / run, TRAIN_LOSS) for run in ("whole", "killed")]
    for each in losses:
        each.pop(STEP, None)  # NaN in one, a number in the other, and used in neither
    assert losses[0] == losses[1]
    ends = [read_scalars(tmp_path / run, VALIDATION_LOSS)[12] for run in ("whole", "killed")]
    assert ends[0] == ends[1]


def test_a_run_that_stops_has_not_updated_and_says_which_documents(runs: Runs, tmp_path: Path) -> None:
    launch, statuses = runs.launch("run", *LENGTH, "--inject-fault", f"inf@{STEP}:0")  # the default policy
    assert statuses == [REFUSED, REFUSED]
    (entry,) = read_ledger(tmp_path / "run")
    assert entry["action"] == "stop" and all("sample 24)" in text for text in entry["documents"])
    assert f"error: step {STEP}: the loss not finite on rank 0" in launch.text and "the run stops" in launch.text
    assert f"which_documents.py --step {STEP}" in launch.text
    assert Checkpoint.open(tmp_path / "run" / "checkpoints").iteration == 4


def test_the_weights_stay_and_the_budget_ends_it(runs: Runs, tmp_path: Path) -> None:
    flags = ["--train-iters", 6, "--save-interval", 1, "--bad-numbers", "skip", "--bad-numbers-budget", 1]
    launch, statuses = runs.launch("run", *flags, "--inject-fault", "nan@3:1", "nan@5:0")
    assert statuses == [REFUSED, REFUSED]
    assert "(--bad-numbers-budget 1 is used up)" in launch.text
    assert [(entry["step"], entry["action"]) for entry in read_ledger(tmp_path / "run")] == [(3, "skip"), (5, "stop")]
    steps = [Checkpoint.open(tmp_path / "run" / "checkpoints", step=step) for step in (1, 2, 3, 4)]
    name = "decoder.layers.mlp.linear_fc2.weight"
    weights = [step.read(name) for step in steps]
    assert weights[1].equal(weights[2]), "step 3 did not update"
    assert not weights[0].equal(weights[1]) and not weights[2].equal(weights[3]), "its neighbours did"
