"""The saves of a run: is there room, is the checkpoint whole, which older ones may go, and what if it failed.

Rank 0 commits each save in a thread (`checkpoint.commit`), so that training does not wait for the hashing. A save
that fails costs nothing but itself: it is said, its folder is removed, and training goes on; after
`MAX_FAILURES` in a row the run stops, because every further step could be lost.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ledom.checkpoint import commit
from megatron_ledom.checkpoint.commit import Keep
from megatron_ledom.engine import saving
from megatron_ledom.errors import CheckpointError, LedomError, OutputError
from megatron_ledom.log import format_seconds, get_logger

MAX_FAILURES = 3
_GO, _SKIP, _STOP = 0, 1, 2


class Saves:
    """Megatron's saves go through here while the block runs; leaving it waits for the last commit.

    Args:
        save: Megatron's `--save` folder; None: nothing is saved.
        keep: which older checkpoints stay.
        rank: of this process.
        token: of this launch, the same on all ranks; part of the names of unfinished saves.

    Raises:
        CheckpointError: on leaving, where the run ended well and its last save failed.
    """

    def __init__(self, save: Path | None, keep: Keep, rank: int, token: str) -> None:
        self._save, self._keep, self._rank, self._token = save, keep, rank, token
        self._commits = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._commit: Future[None] | None = None
        self._failures: list[str] = []  # since the last good save; rank 0 adds those of the commit

    def __enter__(self) -> Saves:
        if self._save is not None:
            saving.install(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        saving.restore()
        self.wait()
        self._commits.shutdown()
        has_ended_well = kind is None or (isinstance(error, SystemExit) and not error.code)
        if has_ended_well and self._failures:
            raise CheckpointError(f"the last save failed: {self._failures[-1]}. {self._what_is_left()}")

    def wait(self) -> None:
        """Wait until the last save is committed or has failed."""
        if self._commit is not None:
            self._commit.result()

    def prepare(self, step: int, model: list[Any]) -> Path | None:
        """Make the folder of the save, or say that there will be none; see `SaveHooks`."""
        assert self._save is not None
        needed = _model_bytes(model)
        verdict = _GO
        if self._rank == 0:
            self.wait()
            verdict = self._begin(step, needed)
        verdict = _from_rank_0(verdict)
        if verdict == _STOP:
            raise CheckpointError(
                f"{len(self._failures) or MAX_FAILURES} saves in a row failed, the last one: "
                f"{(self._failures or ['see rank 0'])[-1]}. {self._what_is_left()}"
            )
        return self._folder(step) if verdict == _GO else None

    def saved(self, step: int, failure: str | None) -> None:
        """Hand a complete save to the thread that commits it; see `SaveHooks`."""
        assert self._save is not None
        if failure is not None:
            self._failures.append(failure)
        elif self._rank != 0:
            self._failures.clear()
        if self._rank != 0:
            return
        if failure is None:
            self._commit = self._commits.submit(self._finish, step)
        else:
            self._discard(step)
            self._say_failure(step, failure)

    def _begin(self, step: int, model_bytes: int) -> int:
        assert self._save is not None
        if len(self._failures) >= MAX_FAILURES:
            return _STOP
        try:
            self._save.mkdir(parents=True, exist_ok=True)
            commit.check_space(self._save, commit.expected_bytes(self._save) or model_bytes)
            commit.begin(self._folder(step))
        except (OSError, OutputError) as error:
            self._failures.append(str(error))
            self._say_failure(step, str(error))
            return _SKIP
        return _GO

    def _finish(self, step: int) -> None:
        assert self._save is not None
        started = time.monotonic()
        try:
            num_bytes = commit.commit(self._folder(step), step)
        except (LedomError, OSError) as error:
            self._failures.append(str(error))
            self._discard(step)
            self._say_failure(step, str(error))
            return
        self._failures.clear()
        took = format_seconds(time.monotonic() - started)
        get_logger(__name__).info("checkpoint %d: %s bytes, hashed and committed in %s", step, f"{num_bytes:,}", took)
        try:
            gone = commit.prune(self._save, self._keep, step)
        except (OutputError, OSError) as error:
            get_logger(__name__).warning("warning: %s", error)
            return
        if gone:
            get_logger(__name__).info("removed the checkpoints of steps %s", ", ".join(map(str, gone)))

    def _folder(self, step: int) -> Path:
        assert self._save is not None
        return commit.partial_folder(self._save, step, self._token)

    def _discard(self, step: int) -> None:
        shutil.rmtree(self._folder(step), ignore_errors=True)

    def _say_failure(self, step: int, failure: str) -> None:
        assert self._save is not None
        free = shutil.disk_usage(self._save).free if self._save.is_dir() else 0
        get_logger(__name__).warning(  # not "error: ", which to a batch script is why the run ended, for good
            "warning: no checkpoint of step %d: %s (%s bytes are free there). %s",
            step,
            failure,
            f"{free:,}",
            self._what_is_left(),
        )

    def _what_is_left(self) -> str:
        assert self._save is not None
        steps = commit.candidates(self._save)
        if not steps:
            return f"{self._save} holds no checkpoint"
        return f"The checkpoint of step {steps[0]} in {self._save} is the last one"


def _from_rank_0(value: int) -> int:
    import torch

    word = torch.tensor([value], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.broadcast(word, src=0)
    return int(word.item())


def _model_bytes(model: list[Any]) -> int:
    """What a first save will take, from the number of parameters: weights, and in fp32 a copy and two moments."""
    import torch
    from megatron.core import parallel_state

    own = sum(
        parameter.numel() * (parameter.element_size() + 12) for chunk in model for parameter in chunk.parameters()
    )
    total = torch.tensor([own], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item())
