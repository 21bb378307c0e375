"""Which checkpoint a launch goes on from: the newest whose every byte is the one that was saved.

All ranks read a share of its files, rank 0 collects what they found and decides, and every rank does what rank 0
says. A damaged checkpoint of the run itself is set aside (`iter_NNNNNNN.damaged`) and the tracker then names the
one that is taken, so that everything that reads the folder afterwards takes the same. Of another run's folder
nothing is changed.

`--load OTHER` and `--finetune` say where a run begins. A batch script starts a stopped run again with the same
command, and then its own checkpoint counts (`prefer_own`): in Megatron the run would begin anew every time.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.checkpoint import commit
from megatron_ledom.checkpoint.integrity import LIST_NAME, find_faults, read_checksums
from megatron_ledom.checkpoint.locate import RELEASE, TRACKER, folder_name, read_tracker
from megatron_ledom.engine.rendezvous import Agreement
from megatron_ledom.errors import CheckpointError, UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.train.run_lock import hold_checkpoints

_ABOUT_THE_BEGINNING = {
    "--load": 1, "--ckpt-step": 1, "--finetune": 0, "--no-load-optim": 0, "--no-load-rng": 0,
}  # fmt: skip
"""Flags that say how another run's checkpoint is loaded, and the words that follow each."""
_TRACKER_WAIT_S = 120.0
"""How long a shared file system may show another node the old tracker."""


@dataclass(frozen=True)
class Settled:
    """What was decided, the same on all ranks.

    Attributes:
        token: a word that no other launch has.
        argv: the command line, which names the step where the tracker of `--load` does not.
        verified: the checkpoint whose files were compared; None where none was.
    """

    token: str
    argv: list[str]
    verified: Path | None


def settle_checkpoint(argv: Sequence[str], agreement: Agreement) -> Settled:
    """Choose the checkpoint of this launch before anything else reads one; call on every rank.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
        OutputExistsError: another launch of this run is under way.
    """
    options = _options(argv)
    if agreement.rank == 0:
        agreement.post("token", uuid.uuid4().hex[:8])
    token = agreement.read("token")
    if options.data_report_only:  # perhaps of a run that is under way elsewhere
        return Settled(token, list(argv), None)
    own = _own_folder(options)
    if agreement.rank == 0:
        if own is not None and own.is_dir():
            hold_checkpoints(own)
        preferred, why = prefer_own(argv)
        if why:
            get_logger(__name__).info("%s", why)
        agreement.post("argv", json.dumps(preferred))
    argv = json.loads(agreement.read("argv"))
    options = _options(argv)
    load = options.load or own
    is_own = load is not None and own is not None and load.absolute() == own.absolute()
    if agreement.rank == 0 and own is not None and own.is_dir():
        for line in commit.clean_leftovers(own):
            get_logger(__name__).info("%s: %s", own, line)
    word = (load / TRACKER).read_text(encoding="utf-8", errors="replace") if load and (load / TRACKER).is_file() else ""
    if load is None or options.ckpt_step is not None or not options.verify or word.strip() == RELEASE:
        return Settled(token, list(argv), None)  # chosen by hand, or weights of another kind, which the guards compare
    if agreement.rank == 0:
        agreement.post("steps", json.dumps(commit.candidates(load)))
    steps: list[int] = json.loads(agreement.read("steps"))
    if not steps:
        return Settled(token, list(argv), None)
    step = choose(load, steps, agreement, is_own=is_own)
    if is_own:
        _wait_for_tracker(load, step)
        return Settled(token, list(argv), load / folder_name(step))
    named = read_tracker(load) == step
    return Settled(token, [*argv, *([] if named else ["--ckpt-step", str(step)])], load / folder_name(step))


def prefer_own(argv: Sequence[str]) -> tuple[list[str], str]:
    """Where a run that began elsewhere has a checkpoint of its own, let it go on from that; changes no file.

    Args:
        argv: the command line, the same at every start of the run.

    Returns:
        The command line to follow, and what was decided, in words; "" where nothing was.

    Raises:
        UsageError: `--finetune` of the run's own checkpoint: every restart would begin anew.
    """
    options = _options(argv)
    own = _own_folder(options)
    steps = [] if own is None else commit.candidates(own)
    has_other = options.load is not None and own is not None and options.load.absolute() != own.absolute()
    if not steps or not (has_other or options.finetune):
        return list(argv), ""
    if not has_other and options.pretrained_checkpoint is None:
        raise UsageError(
            f"--finetune: {own} holds checkpoints of this run already (step {steps[0]}), and every restart would begin "
            f"anew. To go on, drop --finetune; to begin a new run with these weights, give another --run-dir and "
            f"--pretrained-checkpoint {own}"
        )
    other = options.load if has_other else options.pretrained_checkpoint
    why = (
        f"this run goes on from its own checkpoint of step {steps[0]} in {own}; {other} is where it began (to begin "
        "there again, give another --run-dir)"
    )
    return [*_without(argv, _ABOUT_THE_BEGINNING), "--load", str(own)], why


def _without(argv: Sequence[str], flags: Mapping[str, int]) -> list[str]:
    """The command line without some flags and the words that belong to each, written `--flag word` or `--flag=word`."""
    kept, skip = [], 0
    for word in argv:
        name, equals, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in flags:
            skip = 0 if equals else flags[name]
        else:
            kept.append(word)
    return kept


def _own_folder(options: argparse.Namespace) -> Path | None:
    own: Path | None = options.save or (None if options.run_dir is None else options.run_dir / "checkpoints")
    return own


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--no-verify-checkpoint", action="store_false", dest="verify")
    parser.add_argument("--data-report-only", action="store_true")
    parser.add_argument("--finetune", action="store_true")
    for flag in ("--load", "--save", "--run-dir", "--pretrained-checkpoint"):
        parser.add_argument(flag, type=Path)
    return parser.parse_known_args(argv)[0]


def choose(load: Path, steps: list[int], agreement: Agreement, *, is_own: bool, label: str = "start") -> int:
    """The first of `steps` without a fault; damaged ones before it are set aside where they are the run's own.

    Args:
        load: Megatron's folder of checkpoints.
        steps: to look at, in this order; the same on all ranks.
        agreement: between the ranks.
        is_own: whether it is the folder of this run, which may be changed.
        label: another one for each time that this is called.

    Raises:
        CheckpointError: every one is damaged.
    """
    damaged: list[str] = []
    for step in steps:
        folder = load / folder_name(step)
        faults = _faults(folder, step, agreement, _has_lists(load, steps), label)
        if not faults:
            if agreement.rank == 0:
                _take(load, step, steps[: steps.index(step)], damaged, is_own=is_own)
                agreement.post(f"taken/{label}", str(step))
            agreement.read(f"taken/{label}")
            return step
        damaged += faults
    raise CheckpointError(
        f"{load}: no checkpoint is sound: {'; '.join(damaged)}. Bring a copy back, or load one unchecked with "
        "--ckpt-step N --no-verify-checkpoint"
    )


def _faults(folder: Path, step: int, agreement: Agreement, list_expected: bool, label: str) -> list[str]:
    """What all ranks together found wrong with a checkpoint."""
    label = f"{label}/{step}"
    rank, size = agreement.rank, agreement.world_size
    found = commit.structure_faults(folder, list_expected=list_expected) if rank == 0 else []
    try:
        found += find_faults(folder, share=(rank, size)) or [] if folder.is_dir() else []
    except CheckpointError as error:
        found += [str(error)]
    agreement.post(f"faults/{label}/{rank}", json.dumps(found))
    if rank == 0:
        everything = [json.loads(agreement.read(f"faults/{label}/{r}")) for r in range(size)]
        agreement.post(f"verdict/{label}", json.dumps(list(dict.fromkeys(f for some in everything for f in some))))
    verdict: list[str] = json.loads(agreement.read(f"verdict/{label}"))
    return verdict


def _has_lists(load: Path, steps: list[int]) -> bool:
    """Whether this version wrote the checkpoints here: then one without a list has lost it."""
    for step in steps:
        try:
            if read_checksums(load / folder_name(step)) is not None:
                return True
        except CheckpointError:  # there is one, though damaged
            return True
    return False


def _take(load: Path, step: int, refused: list[int], damaged: list[str], *, is_own: bool) -> None:
    logger, folder = get_logger(__name__), load / folder_name(step)
    if refused:
        logger.warning("warning: %s is damaged: %s", load / folder_name(refused[0]), "; ".join(damaged))
        if is_own:
            for other in refused:
                if (load / folder_name(other)).is_dir():
                    logger.warning("warning: it is now %s", commit.set_aside(load / folder_name(other)))
        logger.warning("warning: fell back to step %d, the last checkpoint that is sound", step)
    if is_own and read_tracker(load) != step:
        commit.write_tracker(load, step)
    if read_checksums(folder) is None:
        logger.info("%s has no %s: its files are taken as they are", folder, LIST_NAME)
    else:
        logger.info("checkpoint of step %d verified: every file is the one that was saved", step)


def _wait_for_tracker(load: Path, step: int) -> None:
    deadline = time.monotonic() + _TRACKER_WAIT_S
    while read_tracker(load) != step:
        if time.monotonic() > deadline:
            raise CheckpointError(f"{load / TRACKER} should name step {step}: is this folder shared by all nodes?")
        time.sleep(0.2)
