r"""Where a step of a solution ends: at a line's end, a sentence's end, or a pattern of the user's.

    newline    "He has 3 boxes.\nEach holds 4.\n"    ends after "\n"
    sentence   "He has 3 boxes. Each holds 4."       ends before " Each", which must have begun to be seen
    pattern    "First 3. Then 4; so 12"              with ";\s*" ends after "; "

The text of the steps, put together, is the text of the solution: nothing is added, nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_ledom.data.sentences import SentenceSplitter, load_splitter
from megatron_ledom.errors import UsageError

FindEnd = Callable[[str], int | None]
"""Given the text of a step so far, the character at which it is complete, or None."""
NOTHING_LEARNT = '{"abbrev_types": [], "collocations": [], "sent_starters": [], "ortho_context": {}}'
"""Punkt's parameters before it has seen a corpus: it ends sentences at . ? ! and knows no abbreviation."""


def build_step_end(kind: str, *, pattern: str | None = None, punkt: Path | None = None) -> FindEnd:
    r"""Return the function that finds the end of a step.

    Args:
        kind: "newline", "sentence" or "pattern".
        pattern: regular expression; a step ends where its first match ends.
        punkt: JSON with parameters of Punkt, as tools/preprocess_data.py leaves them beside a dataset; without
            it Punkt knows no abbreviation.

    Raises:
        UsageError: a pattern is missing, is not needed or is none.
        InputError: the parameters cannot be read, or nltk is not installed.

    >>> build_step_end("newline")("3 boxes.\nEach"), build_step_end("newline")("\n3 boxes.")
    (9, None)
    """
    if kind == "sentence":
        return _SentenceEnd(SentenceSplitter(NOTHING_LEARNT, "default") if punkt is None else load_splitter(punkt))
    if kind not in ("newline", "pattern"):
        raise UsageError(f"--step {kind}: newline, sentence or pattern is needed")
    if (kind == "pattern") is not (pattern is not None):
        raise UsageError("--step pattern and --step-pattern belong together")
    return build_pattern_end("\n" if pattern is None else pattern, "--step-pattern")


def build_pattern_end(pattern: str, flag: str) -> FindEnd:
    """Return the function that finds the end of the first match with something to read before it.

    Args:
        pattern: regular expression.
        flag: how the user gave it, for messages.

    Raises:
        UsageError: it is none.
    """
    try:
        return _PatternEnd(re.compile(pattern))
    except re.error as error:
        raise UsageError(f"{flag} {pattern}: not a regular expression ({error})") from error


class _PatternEnd:
    """The end of the first match that has something to read before it."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern

    def __call__(self, text: str) -> int | None:
        for match in self._pattern.finditer(text):
            if text[: match.end()].strip():
                return match.end()
        return None


class _SentenceEnd:
    """The end of the first sentence; white space belongs to the next one."""

    def __init__(self, splitter: SentenceSplitter) -> None:
        self._splitter = splitter

    def __call__(self, text: str) -> int | None:
        starts = self._splitter.starts(text)
        return int(starts[1]) if len(starts) > 1 else None
