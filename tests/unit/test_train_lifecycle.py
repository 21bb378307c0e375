"""A signal to a training process: at once in start-up, by the next save afterwards, and never to its children."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.checkpoint.locate import TRACKER
from megatron_ledom.testing import REPOSITORY, tool_environment
from megatron_ledom.train.lifecycle import STOPPED_STATUS, StopRequest, count_cut_evaluation, end_of_run

PROCESS = """
import argparse, multiprocessing, os, sys, time
from megatron_ledom.train.lifecycle import StopRequest

def child(ready):
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    args = argparse.Namespace(exit_duration_in_mins=None)
    stop = StopRequest()
    stop.watch()
    stop.arm(args)
    phase, method = sys.argv[1:]
    if phase == "running":
        stop.leave_startup(args)
    context = multiprocessing.get_context(method)
    ready = context.Event()
    other = context.Process(target=child, args=(ready,))
    other.start()
    ready.wait()
    print("ready", other.pid, args.exit_duration_in_mins, flush=True)
    while stop.received is None:
        time.sleep(0.01)
    time.sleep(0.3)  # for the child to die in, if it does
    print(stop.received, args.exit_duration_in_mins < 1e-6, other.is_alive(), flush=True)
    other.kill()
"""


def start(tmp_path: Path, phase: str, method: str) -> tuple[subprocess.Popen[str], int]:
    script = tmp_path / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    command = [sys.executable, str(script), phase, method]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tool_environment()
    )
    assert process.stdout
    words = process.stdout.readline().split()
    assert words[0] == "ready"
    assert float(words[2]) > 1e8, "every rank compares clocks from the first step on"
    return process, int(words[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_in_startup_the_process_dies_of_the_signal_at_once(tmp_path: Path, number: signal.Signals) -> None:
    process, child = start(tmp_path, "start-up", "fork")
    process.send_signal(number)
    assert process.wait(timeout=120) == -number
    os.kill(child, signal.SIGKILL)  # it has the pipes, too
    _, said = process.communicate()
    assert said.splitlines()[-1].startswith(f"run ended: {number.name} during start-up; nothing was lost")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_afterwards_it_shortens_the_duration_and_spares_the_children(tmp_path: Path, method: str) -> None:
    process, child = start(tmp_path, "running", method)
    for pid in (child, process.pid):  # Slurm signals every process of a step
        os.kill(pid, signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert said.splitlines()[-1] == "SIGTERM True True"


def test_a_duration_that_was_asked_for_stays() -> None:
    args = argparse.Namespace(exit_duration_in_mins=30)
    StopRequest().arm(args)
    assert args.exit_duration_in_mins == 30


@pytest.mark.parametrize(("consumed", "counted"), [(0, 0), (1, 40), (40, 40), (48, 80)])
def test_a_cut_evaluation_counts_as_whole(consumed: int, counted: int) -> None:
    args = argparse.Namespace(
        full_validation=False, eval_iters=5, eval_global_batch_size=8, consumed_valid_samples=consumed
    )
    count_cut_evaluation(args)
    assert args.consumed_valid_samples == counted


@pytest.mark.parametrize(
    ("received", "step", "rank", "status", "words"),
    [
        ("SIGUSR1", 6, 0, STOPPED_STATUS, "run ended: SIGUSR1; step 7 is saved, the same command goes on from there"),
        ("SIGUSR1", 6, 1, 0, ""),
        (None, 6, 0, 0, "run ended: before step 10, as its arguments ask (--exit-interval ...); step 7 is saved"),
        (None, 9, 0, 0, "run ended: all 10 steps are done; step 7 is saved"),
    ],
)
def test_the_last_line_and_the_status(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    received: str | None,
    step: int,
    rank: int,
    status: int,
    words: str,
) -> None:
    (tmp_path / TRACKER).write_text("7", encoding="utf-8")
    monkeypatch.setenv("RANK", str(rank))
    stop = StopRequest()
    stop.received = received
    args = argparse.Namespace(save=str(tmp_path), curr_iteration=step, iteration=0, train_iters=10, rank=rank)
    assert end_of_run(stop, args) == status
    assert capfd.readouterr().err.strip() == words


RANK = """
import argparse, sys, time
from megatron_ledom.engine.rendezvous import Agreement
from megatron_ledom.train.lifecycle import StopRequest, end_of_run

agreement, stop = Agreement(120), StopRequest()
args = argparse.Namespace(exit_duration_in_mins=None, save=None, curr_iteration=4, iteration=0, train_iters=10)
args.rank = agreement.rank
stop.watch()
stop.arm(args, agreement)
stop.leave_startup(args)
print("ready", flush=True)
while args.rank == 1 and args.exit_duration_in_mins > 1:
    time.sleep(0.01)
agreement.post(f"done/{args.rank}", "")  # as the ranks compare their clocks
agreement.read("done/1")
status = end_of_run(stop, args)
agreement.post(f"ended/{args.rank}", "")
agreement.read("ended/0"), agreement.read("ended/1")  # rank 0 holds the store
sys.exit(status)
"""


def test_a_signal_to_another_rank_alone_is_told_by_rank_0(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=tool_environment(launch | {"RANK": str(rank)}),
        )
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            assert rank.stdout and rank.stdout.readline() == "ready\n"
        ranks[1].send_signal(signal.SIGUSR1)
        said = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [STOPPED_STATUS, 0], said
    assert said[0].splitlines()[-1] == (
        "run ended: SIGUSR1 to rank 1; nothing was saved, the same command goes on from there"
    )


def test_the_trainer_listens_before_anything_starts_threads() -> None:
    """A thread that numpy or torch has started before would not block the signals, and the process would die."""
    code = "import sys, megatron_ledom.train.lifecycle; print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=tool_environment(), cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"
    trainer = (REPOSITORY / "tools/pretrain.py").read_text(encoding="utf-8")
    assert trainer.index("stop.watch()") < trainer.index("from torch.")
    assert trainer.count("\nfrom megatron_ledom") == 1, "errors alone is imported before"
