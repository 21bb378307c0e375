"""Text that grows leftwards, on a terminal: redrawn with each token, because a new beginning moves everything after it.

    step 1                        time.           what is given, dimmed
    step 2                      a time.           the text is wrapped anew each time
    step 3                 upon a time.

`rich` measures characters, wraps and redraws. A text of more lines than the terminal is shown from its beginning,
which is where it grows. When writing is over the drawing is erased, and the caller prints the whole.
"""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from megatron_ledom.inference.sampling import WrittenText

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model may write what a terminal obeys
_LEAST_S = 0.05


class GrowingTexts:
    """Shows samples while they are written; a context manager.

    Args:
        given: the text that they precede.
        stream: a terminal.
    """

    def __init__(self, given: str, stream: TextIO) -> None:
        self._given = given
        self._live = Live(
            console=Console(file=stream), auto_refresh=False, transient=True, vertical_overflow="crop", screen=False
        )
        self._last = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, samples: list[WrittenText]) -> None:
        """Draw the samples as they are now, twenty times a second at most."""
        now = time.monotonic()
        if now - self._last < _LEAST_S:
            return
        self._last = now
        parts: list[Text | Rule] = []
        for number, sample in enumerate(samples, start=1):
            if len(samples) > 1:
                state = ", complete" if sample.reached_beginning else ""
                parts.append(Rule(f"sample {number} of {len(samples)}{state}", style="dim"))
            written = sample.whole.removesuffix(self._given)
            parts.append(Text.assemble(_harmless(written), (_harmless(self._given), "dim")))
        self._live.update(Group(*parts), refresh=True)


def _harmless(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
