"""Megatron's saves, sent to a folder of another name and survived when the disk refuses.

Megatron 0.19.2 writes into `iter_NNNNNNN` itself, overwrites the tracker in place, and where rank 0 alone meets
an error (index, seal or tracker) the other ranks wait for it in a collective. `install` changes this and nothing
else about a save; what is written and by whom stays Megatron's:

    get_checkpoint_name           while a save is prepared: the folder that the hooks give
    get_checkpoint_tracker_filename     likewise: nowhere, the commit writes the real one
    FileSystemWriterAsync.finish, save_config   an OSError of rank 0 is kept, so that all ranks go on alike
    save_checkpoint               asks the hooks first, tells them afterwards
    schedule_async_save, maybe_finalize_async_save   the same for a save that goes on in the background

It decides nothing: `train.saves` does, through `SaveHooks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ledom.engine.patching import Patches

_patches = Patches()


class SaveHooks(Protocol):
    """What is asked and told about each save; every method is called on every rank, in the same order."""

    def prepare(self, step: int, model: list[Any]) -> Path | None:
        """Return the folder to write to, or None to go on without this save."""

    def saved(self, step: int, failure: str | None) -> None:
        """Every rank has written the checkpoint of `step`, or not: `failure` is why, and the same on all ranks."""


def install(hooks: SaveHooks) -> None:
    """Route Megatron's saves through `hooks`, once a process."""
    restore()
    import megatron.core.dist_checkpointing.serialization as serialization
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training

    redirect = _Redirect(hooks)
    for writer in _writer_classes():
        _patches.replace(writer, "finish", redirect.keep_error(writer.finish))
    _patches.replace(serialization, "save_config", redirect.keep_error(serialization.save_config))
    name, tracker = checkpointing.get_checkpoint_name, checkpointing.get_checkpoint_tracker_filename
    _patches.replace(checkpointing, "get_checkpoint_name", redirect.name(name))
    _patches.replace(checkpointing, "get_checkpoint_tracker_filename", redirect.tracker(tracker))
    _patches.replace(checkpointing, "schedule_async_save", redirect.schedule(checkpointing.schedule_async_save))
    _patches.replace(training, "save_checkpoint", redirect.save(training.save_checkpoint))
    finalize = redirect.finalize(training.maybe_finalize_async_save)
    _patches.replace(training, "maybe_finalize_async_save", finalize)


def background_save_risk(device: str, is_async: bool, environment: Mapping[str, str]) -> str | None:
    """What to warn of where saves in the background may never end; None where nothing speaks against them.

    On CUDA Megatron's persistent worker (`PersistentAsyncCaller`, megatron-core 0.19) gets the tensors through a queue,
    by CUDA IPC. The worker opens expandable segments of torch's allocator by `pidfd_getfd`; where the kernel refuses
    that, the worker dies, and the rank waits in `preload_q.join()` for it. Reported as pytorch/pytorch#165685 and
    NVIDIA/Megatron-LM#4343; nothing of it has run on a GPU of this project.

    Args:
        device: "cpu" or "cuda".
        is_async: whether saves go on in the background.
        environment: of the process.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    found = [name for name in names if "expandable_segments:true" in environment.get(name, "").lower().replace(" ", "")]
    if device != "cuda" or not is_async or not found:
        return None
    return (
        f"{found[0]}={environment[found[0]]} with saves in the background: where kernel.yama.ptrace_scope is 1 or "
        "more, or a container forbids pidfd_getfd, the first save never ends and every rank waits for it. Unset it, or "
        "give --no-async-save"
    )


def restore() -> None:
    """Give Megatron its own functions back."""
    _patches.restore()


def finish_pending_save() -> None:
    """Wait until a save that goes on in the background is on disk; on every rank."""
    import megatron.training.training as training

    training.maybe_finalize_async_save(blocking=True)


def _writer_classes() -> list[Any]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    classes = [FileSystemWriterAsync]
    try:  # NVIDIA's package, which Megatron prefers where it is installed
        import nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async as filesystem_async
    except ImportError:
        return classes
    return [*classes, filesystem_async.FileSystemWriterAsync]


class _Redirect:
    """The replaced functions, and what they know of the save that is under way."""

    def __init__(self, hooks: SaveHooks) -> None:
        self._hooks = hooks
        self._folder: Path | None = None  # while Megatron prepares a save
        self._step = 0
        self._pending: int | None = None  # a save that goes on in the background
        self._error: OSError | None = None  # of rank 0 alone

    def name(self, original: Callable[..., str]) -> Callable[..., str]:
        def get_checkpoint_name(*args: Any, **kwargs: Any) -> str:
            return original(*args, **kwargs) if self._folder is None else str(self._folder)

        return get_checkpoint_name

    def tracker(self, original: Callable[[Any], str]) -> Callable[[Any], str]:
        def get_checkpoint_tracker_filename(path: Any) -> str:
            return original(path) if self._folder is None else os.devnull

        return get_checkpoint_tracker_filename

    def keep_error(self, original: Callable[..., None]) -> Callable[..., None]:
        def finish(*args: Any, **kwargs: Any) -> None:
            try:
                original(*args, **kwargs)
            except OSError as error:
                self._error = error

        return finish

    def save(self, original: Callable[..., None]) -> Callable[..., None]:
        """Wrap `save_checkpoint`: written under another name, and closed by the hooks whatever came of it."""

        def save_checkpoint(iteration: int, model: Any, *args: Any, **kwargs: Any) -> None:
            """Save as Megatron does, into the folder that the hooks prepared; a write that failed ends no run."""
            from megatron.core.dist_checkpointing.core import CheckpointingException
            from megatron.training import get_args
            from torch.distributed.checkpoint.api import CheckpointException

            if kwargs.get("non_persistent_ckpt"):
                original(iteration, model, *args, **kwargs)
                return
            finish_pending_save()  # two at a time would need twice the memory, and could end in the wrong order
            folder = self._hooks.prepare(iteration, model)
            if folder is None:
                return
            failure = None
            self._folder, self._step = folder, iteration
            try:
                original(iteration, model, *args, **kwargs)
            except (CheckpointException, CheckpointingException) as error:
                failure = _reason(error)
            finally:
                self._folder = None
            if failure is not None or not get_args().async_save:
                self._close(iteration, failure)

        return save_checkpoint

    def schedule(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def schedule_async_save(request: Any) -> None:
            if self._folder is not None:
                step = self._pending = self._step
                request.add_finalize_fn(lambda: self._close(step, None))
            original(request)

        return schedule_async_save

    def finalize(self, original: Callable[..., None]) -> Callable[..., None]:
        """Wrap `maybe_finalize_async_save`: a background save that failed is closed, and ends no run."""

        def maybe_finalize_async_save(blocking: bool = False, terminate: bool = False) -> None:
            """Finalise as Megatron does; after a failure once more, for what else is pending."""
            from torch.distributed.checkpoint.api import CheckpointException

            try:
                original(blocking=blocking, terminate=terminate)
            except CheckpointException as error:  # raised on all ranks, because one could not write
                assert self._pending is not None, "an asynchronous save failed that nobody has begun"
                self._close(self._pending, _reason(error))
                original(blocking=blocking, terminate=terminate)

        return maybe_finalize_async_save

    def _close(self, step: int, failure: str | None) -> None:
        """Tell the hooks how the save ended; rank 0 speaks for all."""
        import torch

        if failure is None and self._error is not None:
            failure = str(self._error)
        self._error, self._pending = None, None
        words: list[str | None] = [failure]
        torch.distributed.broadcast_object_list(words, src=0)
        self._hooks.saved(step, words[0] if failure is None else failure)


def _reason(error: BaseException) -> str:
    """The file system's words in an exception of the checkpoint writer, which carries whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Errno" in line or "Error" in line or "failure" in line]
    return (telling or lines or [type(error).__name__])[-1]
