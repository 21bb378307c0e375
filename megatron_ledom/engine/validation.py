"""Megatron's own validation of a command line, without creating anything: before a job, on any machine."""

from __future__ import annotations

import argparse
import traceback

from megatron_ledom.errors import UsageError


def validate_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Let Megatron validate and complete what `parse_arguments` returned; nothing else is created.

    Args:
        args: with `rank` and `world_size` as in the job that is meant (`RANK` and `WORLD_SIZE` when it was parsed).

    Returns:
        `args`, completed.

    Raises:
        UsageError: Megatron refuses; with its words.
    """
    from megatron.training.arguments import validate_args

    try:
        validate_args(args, {})
    except AssertionError as error:
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UsageError(f"Megatron refuses these arguments: {reason}") from error
    return args
