"""The weights that a run starts from, and the model that they belong to.

Megatron loads weights into whatever model the flags describe and compares three of its
arguments. The others would fail late, by a shape, or not at all: another epsilon of the
norm or another rotary base trains without a word on weights that were made for a
different function. Here a run takes the model from the checkpoint when asked to
(`--use-checkpoint-args`), and is refused when flags or preset describe another one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.locate import TRACKER
from megatron_ledom.checkpoint.unpickle import SavedValue
from megatron_ledom.engine.arguments import ALONG_WITH_MODEL, MODEL_ARGUMENTS, USE_CHECKPOINT
from megatron_ledom.errors import CheckpointError, UsageError
from megatron_ledom.log import get_logger


def model_from_checkpoint(argv: Sequence[str]) -> dict[str, Any]:
    """Return the model's arguments from the checkpoint that the run will load, if `--use-checkpoint-args` asks for it.

    Args:
        argv: the command line; flags that are none of ours here are passed over.

    Raises:
        UsageError: it names no checkpoint.
        CheckpointError: the checkpoint cannot be read.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument(USE_CHECKPOINT, action="store_true")
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--preset")
    for flag in ("--load", "--pretrained-checkpoint", "--run-dir"):
        parser.add_argument(flag, type=Path)
    options, _ = parser.parse_known_args(argv)
    if not options.use_checkpoint_args:
        return {}
    own = None if options.run_dir is None else options.run_dir / "checkpoints"
    load = options.load or own
    has_checkpoint = load is not None and (load / TRACKER).is_file()
    path = load if has_checkpoint else options.pretrained_checkpoint
    if path is None:
        raise UsageError(f"{USE_CHECKPOINT} needs a checkpoint: give --pretrained-checkpoint CHECKPOINT or --load")
    written = Checkpoint.open(path, options.ckpt_step).args
    length = () if options.preset else ("seq_length",)
    return _plain_values(written, (*MODEL_ARGUMENTS, *ALONG_WITH_MODEL, *length))


def vocabulary_rows(parsed: argparse.Namespace, origin: dict[str, Any] | None) -> dict[str, Any]:
    """The rows of the tables for weights that came from Hugging Face: theirs, and what tensor parallelism needs.

    Megatron would take the tokenizer's ids instead: rows beyond them would be lost at load, and
    padding that the original does not have would join the softmax.

    Returns:
        `padded_vocab_size`, or nothing where the weights have no such origin.
    """
    if origin is None:
        return {}
    size = parsed.tensor_model_parallel_size
    return {"padded_vocab_size": -(-origin["vocab_size"] // size) * size}


def check_same_model(where: str, written: argparse.Namespace, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Refuse to load weights into another model than theirs, unless the command line itself asks for the change.

    Args:
        where: the flag that named the checkpoint, and its folder.
        written: its arguments.
        args: the run's, validated by Megatron.
        argv: the run's command line: what it names is meant (a longer context, a larger rotary base).

    Raises:
        CheckpointError: naming every argument that differs, with both values.
    """
    before, now = _plain_values(written, MODEL_ARGUMENTS), _plain_values(args, MODEL_ARGUMENTS)
    differing = {name: (before[name], now[name]) for name in before if _differs(name, before, now)}
    words = {word.split("=", 1)[0] for word in argv}
    meant = {name for name in differing if words & {_flag(name), _flag(f"no_{name}")}}
    for name in sorted(meant):
        was, is_now = differing[name]
        get_logger(__name__).warning("%s: %s was %s; %s, as asked for", where, name, was, is_now)
    unasked = [f"{name} was {differing[name][0]}, is {differing[name][1]}" for name in differing if name not in meant]
    if unasked:
        raise CheckpointError(
            f"{where}: its model is another one ({'; '.join(unasked)}). Take the model from the checkpoint with "
            f"{USE_CHECKPOINT}, or name each change on the command line"
        )


def _plain_values(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The arguments called `names`, without notes of Megatron's own classes, which are left to Megatron."""
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {name: value for name, value in values.items() if not isinstance(value, SavedValue)}


def _differs(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    counts_beside = {"num_query_groups": "group_query_attention", "rope_scaling_factor": "use_rope_scaling"}.get(name)
    if counts_beside and not (before.get(counts_beside) or now.get(counts_beside)):
        return False
    return name in now and before[name] != now[name]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
