"""The error classes of the project, and when to raise which.

A message says three things: what was asked, what was found (with the name of the
file, line, flag or tensor), and what to do. Command-line tools turn every
`LedomError` into one line on standard error and exit status 2 (`run_cli`);
anything else is a bug of ours and keeps its traceback. `assert` is for our own
invariants only.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


class LedomError(Exception):
    """Base of every error that a user can mend; never raised itself."""


class UsageError(LedomError):
    """A flag, or a combination of flags, that cannot work."""


class InputError(LedomError):
    """An input file or folder that is missing, empty, malformed or truncated."""


class OutputExistsError(LedomError):
    """The output is already there: nothing is overwritten unless asked for."""


class OutputError(LedomError):
    """The file system refuses the output: no space, no permission, a size limit."""


class DirectionError(LedomError):
    """Data, weights or a request that run in different directions."""


class TokenizerMismatchError(LedomError):
    """Data and run, or data and weights, that were made with different tokenizers."""


class CheckpointError(LedomError):
    """A checkpoint that is missing, unfinished, damaged or of another kind."""


class BadNumbersError(LedomError):
    """NaN, infinity or a spike in training, where the policy is to stop."""


class ParityError(LedomError):
    """Two computations that must agree do not; the message carries the numbers."""


class PrecisionError(LedomError):
    """A run in FP8 that has gone too far from BF16, and was asked to stop then."""


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Run a tool's `main(argv)` and exit with its status.

    A `LedomError` becomes `error: ...` on standard error and exit status 2;
    Ctrl-C exits with 130, as a shell expects. Other exceptions propagate with
    their traceback. Under torchrun the first rank of a node speaks for all, and the
    message is also what torchrun itself reports as the cause.
    """
    try:
        status = main(sys.argv[1:])
    except LedomError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        tell_torchrun(str(error))
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    raise SystemExit(status or 0)


def tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for the cause of a rank's failure, in place of a traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):  # the launcher then reports the exit status alone
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
