"""SIGKILL at random moments of a run that saves every five steps: no restart loads anything but a verified checkpoint.

Ten moments here; LEDOM_KILL_MOMENTS=30 for the whole exercise (docs/checkpoints.md has its result). Half of the
kills leave what the rank has started running, as a real one does.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from fork_server import DEADLINE_S, ForkServer, Launch
from small_run import NARROW

from megatron_ledom.checkpoint.integrity import verify_checksums
from megatron_ledom.checkpoint.locate import finished_steps, folder_name, read_tracker
from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars
from megatron_ledom.train.run_lock import LOCK

pytestmark = pytest.mark.distributed

NUM_MOMENTS = int(os.environ.get("LEDOM_KILL_MOMENTS", "10"))
LENGTH = 100
PHASES = {
    # what the log says when the phase has begun -> how often it must say so, at most, and how much later the kill comes
    "start": (r"run directory|building GPT|loading distributed checkpoint|before the start of training", 1, 0.5),
    "step": (r"iteration +\d+/", 9, 0.3),
    "save": (r"saving checkpoint at iteration", 2, 0.8),
    "commit": (r"successfully saved checkpoint|hashed and committed", 4, 0.05),
}


def kill_at_a_random_moment(launch: Launch, phase: str, chance: random.Random) -> bool:
    """Wait for the phase, a little longer, and kill; False where the run ended first."""
    pattern, at_most, delay_s = PHASES[phase]
    seen = chance.randint(1, at_most)
    pattern = chance.choice(pattern.split("|")) if phase == "start" else pattern
    deadline = time.monotonic() + DEADLINE_S
    while len(re.findall(pattern, launch.text)) < seen:
        if not launch.server.are_alive(launch.pids):
            return False
        if time.monotonic() > deadline:
            launch.signal(signal.SIGUSR1)  # every thread prints its stack
            time.sleep(2)
            pytest.fail(f"{phase}: nothing happens: {launch.text[-6000:]}")
        time.sleep(0.01)
    time.sleep(chance.uniform(0, delay_s))
    if not launch.server.are_alive(launch.pids):
        return False
    launch.kill(rank=0 if chance.random() < 0.5 else None)
    return True


def test_every_restart_loads_a_verified_checkpoint_and_the_end_is_the_same(
    tmp_path: Path, fork_server: ForkServer, data_arguments: list[object]
) -> None:
    arguments = [*NARROW, *data_arguments, "--train-iters", LENGTH, "--save-interval", 5, "--keep-last", 3]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch = fork_server.start([*arguments, "--run-dir", whole], 1, tmp_path / "whole.log")
    assert launch.wait() == [0], launch.text[-6000:]

    chance = random.Random(20261126)
    save, moments, known, launches = killed / "checkpoints", [], 0, 0
    while True:
        launches += 1
        launch = fork_server.start([*arguments, "--run-dir", killed], 1, tmp_path / f"{launches}.log")
        phase = chance.choice(list(PHASES))
        before = known
        was_killed = len(moments) < NUM_MOMENTS and kill_at_a_random_moment(launch, phase, chance)
        if not was_killed:
            assert launch.wait() == [0], launch.text[-6000:]
        loaded = re.search(r"loading distributed checkpoint from \S+ at iteration (\d+)", launch.text)
        if loaded:
            assert f"checkpoint of step {loaded[1]} verified: every file" in launch.text
            assert int(loaded[1]) == known, f"{known} was committed"
        elif "before the start of training step" in launch.text:
            assert known == 0, f"step {known} was committed, and the run began anew"
        assert "is damaged" not in launch.text
        known = read_tracker(save) or 0
        if was_killed:
            moments.append(f"{phase} {before}->{known}")
        elif len(moments) == NUM_MOMENTS:
            break
        else:  # it reached the end before all kills were spent: once more from the start
            assert read_scalars(killed, TRAIN_LOSS) == read_scalars(whole, TRAIN_LOSS)
            killed.rename(tmp_path / f"ended-{launches}")
            known = 0
    print(f"{launches} launches, killed: {'; '.join(moments)}")
    assert len(moments) == NUM_MOMENTS

    assert read_scalars(killed, TRAIN_LOSS) == read_scalars(whole, TRAIN_LOSS), "every step, to the last bit"
    assert read_scalars(killed, VALIDATION_LOSS)[LENGTH] == read_scalars(whole, VALIDATION_LOSS)[LENGTH]
    assert finished_steps(save) == [90, 95, 100]
    assert all(verify_checksums(save / folder_name(step)) for step in finished_steps(save))
    assert {path.name for path in save.glob(".*")} == {LOCK}, "nothing half-written is left"
