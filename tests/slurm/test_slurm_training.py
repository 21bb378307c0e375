"""The training scripts on a real Slurm with the CPU engine: signals in every phase, a crash loop, a refusal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slurm_jobs import Job, Scripts, wait_for_tasks

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.train.metrics import TRAIN_LOSS, VALIDATION_LOSS, read_scalars

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

SMALL = [
    *(
        "--num-layers",
        2,
        "--hidden-size",
        32,
        "--ffn-hidden-size",
        64,
        "--seq-length",
        64,
        "--max-position-embeddings",
        64,
    ),
    *("--make-vocab-size-divisible-by", 64, "--micro-batch-size", 1, "--global-batch-size", 16, "--log-interval", 1),
]
# Evaluation after step 20 takes a second or more, unless it is left.
SCHEDULE = ["--train-iters", 30, "--eval-interval", 20, "--eval-iters", 150]


@pytest.fixture
def data(prefixes: dict[str, Path], tokenizer_folder: Path) -> dict[str, object]:
    return {"DATA_PATH": prefixes["reverse"], "TOKENIZER": tokenizer_folder}


def ended(job: Job) -> list[str]:
    """Why each start of the job ended."""
    return re.findall(r"job ended: (.*)", job.text())


def logged_steps(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^ \[.*iteration +(\d+)/", text, re.M)]


def near_its_limit(job: Job) -> str:
    """Signal the batch script as Slurm does before the time limit, and return what this start says in the end."""
    job.slurm.call("scancel", "--signal=USR1", "--batch", job.number)
    return job.wait_for(r"job ended: .*")


def signal_tasks(job: Job) -> str:
    """Signal the tasks and not the batch script, as at a preemption; return what this start says in the end."""
    job.slurm.call("scancel", "--signal=TERM", job.number)
    return job.wait_for(r"job ended: .*")


def test_a_job_signalled_in_every_phase_ends_as_the_undisturbed_one(
    scripts: Scripts, data: dict[str, object], tmp_path: Path
) -> None:
    whole = scripts.submit(
        "train_2b.sbatch",
        *SMALL,
        *SCHEDULE,
        options=("--nodes=1", "--ntasks=4"),
        RUN_DIR=tmp_path / "whole",
        SAVE_INTERVAL=27,
        **data,
    )
    assert whole.wait() == ["COMPLETED"], whole.end()
    assert ended(whole) == ["done (step 30)"]
    assert whole.last_line().endswith("job ended: done (step 30)")

    run = tmp_path / "run"
    job = scripts.submit(
        "train_7b.sbatch", *SMALL, *SCHEDULE, options=("--nodes=1", "--ntasks=2"), RUN_DIR=run, SAVE_INTERVAL=27, **data
    )

    job.wait_for("^attention: ")  # start-up
    assert "stopped by SIGUSR1; requeued (restart 1)" in near_its_limit(job)
    assert "run ended: SIGUSR1 during start-up" in job.text()

    job.wait_for(r"iteration +2/")  # a step
    said = signal_tasks(job)
    step = Checkpoint.open(run / "checkpoints").iteration
    assert f"stopped by a signal to the tasks (step {step}); requeued (restart 2)" in said
    assert step == max(logged_steps(job.text())), "the step under way was finished, saved, and no other begun"
    assert 2 <= step < 20

    job.wait_for(r"iteration +20/")  # evaluation
    assert "(step 20); requeued (restart 3)" in near_its_limit(job)
    assert "validation loss at iteration 20 " not in job.text(), "left before its end"

    job.wait_for(r"saving checkpoint at iteration +27 ")  # a save
    said = near_its_limit(job)
    step = Checkpoint.open(run / "checkpoints").iteration
    assert f"(step {step}); requeued (restart 4)" in said
    assert 27 <= step < 30

    assert job.wait() == ["COMPLETED"], job.end()
    assert ended(job)[-1] == "done (step 30)"
    assert logged_steps(job.text()) == list(range(1, 31)), "no step was lost, none repeated"

    assert read_scalars(run, TRAIN_LOSS) == pytest.approx(read_scalars(tmp_path / "whole", TRAIN_LOSS), rel=1e-5)
    undisturbed, found = read_scalars(tmp_path / "whole", VALIDATION_LOSS), read_scalars(run, VALIDATION_LOSS)
    assert set(undisturbed) == {20, 30}
    assert found == pytest.approx({30: undisturbed[30]}, rel=1e-5), "on the same samples"


def kill_tasks(run: Path) -> None:
    """SIGKILL both ranks as soon as they are there: what the kernel does when memory is out.

    Both: srun ends the other by SIGTERM, and reports the higher status.
    """
    for process in wait_for_tasks("tools/pretrain.py", str(run), count=2):
        process.kill()


def test_a_crash_loop_stops(scripts: Scripts, data: dict[str, object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = scripts.submit(
        "train_7b.sbatch", *SMALL, *SCHEDULE, options=("--nodes=1", "--ntasks=2"), RUN_DIR=run, MAX_FAILURES=2, **data
    )
    kill_tasks(run)
    assert "failure 1 of 2 without progress, status 137" in job.wait_for(r"job ended: .*")
    job.slurm.start_now(job.number)
    kill_tasks(run)
    assert job.wait() == ["FAILED"], job.end()
    assert "failure 2 of 2 without progress, status 137; not started again" in job.last_line()
    assert not list((run / "slurm").iterdir()), "submitted again by hand it may fail as often"


def test_what_the_tool_refuses_is_not_tried_again(scripts: Scripts, data: dict[str, object], tmp_path: Path) -> None:
    absent = data | {"DATA_PATH": tmp_path / "absent"}
    job = scripts.submit("train_2b.sbatch", options=("--nodes=1", "--ntasks=1"), RUN_DIR=tmp_path / "run", **absent)
    assert job.wait() == ["FAILED"], job.end()
    assert re.search(r"job ended: refused: error: .*absent", job.last_line())
    assert job.slurm.field(job.number, "Restarts") == "0"


def test_a_preempted_job_comes_back_and_a_cancelled_one_does_not(
    scripts: Scripts, data: dict[str, object], tmp_path: Path
) -> None:
    job = scripts.submit("train_2b.sbatch", options=("--nodes=1", "--ntasks=1"), RUN_DIR=tmp_path / "run", **data)
    job.wait_for(r"CUDA_HOME|^attention: ")  # the first thing that torch, or the run, says
    whole_node = ("--ntasks=16", "--output=/dev/null", "--wrap=true")
    job.slurm.call("sbatch", "--partition=urgent", *whole_node)
    assert "stopped by SIGTERM of a preemption; requeued (restart 1)" in job.wait_for("job ended: .*")

    job.wait_for(r"CUDA_HOME|^attention: ")
    job.slurm.call("scancel", job.number)
    assert job.wait() == ["CANCELLED"]
    assert "so it is not started again from here" in job.wait_for("job ended: .*")
    assert job.slurm.field(job.number, "Restarts") == "1"
