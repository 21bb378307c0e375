"""What must agree before a run starts: data, tokenizer, checkpoint and run.

Direction and tokenizer are facts that datasets and checkpoints carry; this module
reads them there and refuses a mixture with both facts named. It decides nothing about
the training itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.integrity import LIST_NAME, verify_checksums
from megatron_ledom.checkpoint.locate import RELEASE
from megatron_ledom.data.dataset import CheckedDataset, check_datasets
from megatron_ledom.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction, check_same_direction
from megatron_ledom.errors import CheckpointError, TokenizerMismatchError, UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.train.datasets import data_prefixes
from megatron_ledom.train.pairs import check_pairs


@dataclass(frozen=True)
class RunFacts:
    """What the data and checkpoints of a run say of themselves.

    Attributes:
        tokenizer: the run's tokenizer; None without data.
        datasets: prefix -> what was found out about the dataset.
        checkpoints: flag -> the checkpoint that it names (`--load` first).
    """

    tokenizer: Tokenizer | None
    datasets: dict[str, CheckedDataset]
    checkpoints: dict[str, Checkpoint]

    @property
    def resumed(self) -> argparse.Namespace | None:
        """The arguments of the run that goes on; None where weights without an optimizer are loaded, or nothing."""
        checkpoint = self.checkpoints.get("--load")
        return None if checkpoint is None or checkpoint.folder.name == RELEASE else checkpoint.args

    @property
    def hf_origin(self) -> dict[str, Any] | None:
        """What the weights brought along from a Hugging Face folder (`convert.from_hf`), or None."""
        written = [getattr(checkpoint.args, "hf_origin", None) for checkpoint in self.checkpoints.values()]
        return written[0] if written else None

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The fingerprint that the checkpoints of the run carry; None without data."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint


def check_run(args: argparse.Namespace, verified: Path | None = None) -> RunFacts:
    """Refuse data or a checkpoint that does not fit the run's direction or tokenizer.

    Args:
        args: the parsed command line; Megatron need not have validated it.
        verified: a checkpoint whose files have been compared with their checksums already.

    Raises:
        InputError: a dataset is missing or damaged.
        DirectionError, TokenizerMismatchError: with both facts; data that can be read backwards is taken.
        CheckpointError: `--load` names a folder without a finished checkpoint, or one that is damaged.
    """
    direction = Direction.parse(args.direction, where="--direction")
    prefixes = data_prefixes(args)
    tokenizer, fingerprint, datasets = None, None, {}
    if prefixes:
        tokenizer = load_tokenizer(
            args.tokenizer_type, args.tokenizer_model, vocab_file=args.vocab_file, merge_file=args.merge_file
        )
        fingerprint = tokenizer.fingerprint
        found = check_datasets(
            prefixes,
            direction=direction,
            tokenizer_fingerprint=fingerprint,
            eod_id=tokenizer.eod_id,
            vocab_size=tokenizer.vocab_size,
        )
        datasets = dict(zip(prefixes, found, strict=True))
    check_pairs(args, datasets)
    checkpoints = {
        flag: check_checkpoint(flag, path, step=args.ckpt_step, direction=direction, fingerprint=fingerprint)
        for flag, path in _checkpoints_to_load(args)
    }
    if args.verify_checkpoint and args.rank == 0:  # when one rank ends, the launcher ends the others
        for checkpoint in checkpoints.values():
            if checkpoint.folder != verified:
                check_integrity(checkpoint.folder)
    return RunFacts(tokenizer, datasets, checkpoints)


def _checkpoints_to_load(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    if args.load is not None:
        yield "--load", Path(args.load)
    if args.pretrained_checkpoint is not None:
        yield "--pretrained-checkpoint", Path(args.pretrained_checkpoint)


def check_checkpoint(
    flag: str, path: Path, *, step: int | None, direction: Direction, fingerprint: str | None
) -> Checkpoint:
    """Refuse to continue from a checkpoint of another direction or tokenizer.

    Args:
        flag: the flag that named it, for the message.
        path: Megatron's checkpoint folder.
        step: the iteration wanted, or None for the last one.
        direction: the run's direction.
        fingerprint: the run's tokenizer, or None where it has no data.

    Returns:
        The checkpoint, open.

    Raises:
        CheckpointError: nothing finished is there, or the checkpoint does not say its direction.
        DirectionError, TokenizerMismatchError: with both facts.
    """
    checkpoint = Checkpoint.open(path, step=step)
    check_same_direction(
        direction, checkpoint.direction, expected_by="this run (--direction)", found_in=f"the checkpoint {path}"
    )
    other = getattr(checkpoint.args, "tokenizer_fingerprint", None)
    if fingerprint is not None and other is not None and fingerprint != other:
        raise TokenizerMismatchError(
            f"{flag} {path}: its weights were trained with tokenizer {other}, this run uses {fingerprint}. "
            "Use the tokenizer of the checkpoint (its folder is copied to RUN/tokenizer)"
        )
    return checkpoint


def check_integrity(folder: Path) -> None:
    """Refuse a checkpoint whose files are not those that were saved; say it where that is not known.

    Raises:
        CheckpointError: naming the files.
    """
    try:
        has_list = verify_checksums(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (--no-verify-checkpoint loads it unchecked)") from error
    if not has_list:
        get_logger(__name__).info("%s has no %s: its files are taken as they are", folder, LIST_NAME)


def check_schedule(args: argparse.Namespace, written: argparse.Namespace) -> None:
    """Refuse to continue under another learning-rate schedule without being told which one counts.

    Megatron asserts this too, after the model is built and without naming a flag.

    Raises:
        UsageError: naming what differs, and the flags that decide.
    """
    is_decided = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if args.finetune or args.no_load_optim or is_decided:
        return
    before, now = _schedule(written), _schedule(args)
    differing = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
    if differing:
        raise UsageError(
            f"--load {args.load}: its schedule is another one ({'; '.join(differing)}). Give the same flags as before "
            "(to stop a run early and go on later, use --exit-interval), or decide with "
            "--override-opt-param-scheduler (the new schedule) or --use-checkpoint-opt-param-scheduler (the old one)"
        )


def _schedule(args: argparse.Namespace) -> dict[str, Any]:
    """The schedule that Megatron's `get_optimizer_param_scheduler` builds from `args`, lengths in samples."""
    batch = args.global_batch_size
    by_samples = bool(args.train_samples)
    length = args.train_samples if by_samples else (args.train_iters or 0) * batch
    decay = args.lr_decay_samples if by_samples else (args.lr_decay_iters or 0) * batch
    warmup = args.lr_warmup_samples if by_samples else args.lr_warmup_iters * batch
    return {
        "--lr": args.lr,
        "--min-lr": args.min_lr,
        "--lr-decay-style": args.lr_decay_style,
        "decay length in samples": decay or length,
        "warm-up": warmup if args.lr_warmup_fraction is None else f"{args.lr_warmup_fraction:g} of the decay",
        "length of the run in samples": length,
        "weight decay": (args.start_weight_decay, args.end_weight_decay, args.weight_decay_incr_style),
    }
