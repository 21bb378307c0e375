r"""Final answers of worked solutions: found, compared and put into groups by math-verify.

Whether two answers are equal is math-verify's judgement ("1/2" is "0.5", "1,250" is "1250"), and so is what the
final answer of a text is: what it finds in a \boxed{}, in mathematics or last in the text. This module owns the pattern
that may narrow that down, a cache (samples repeat), and what counts as no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_ledom.errors import InputError, UsageError

MARKED_ANSWER = r"####\s*(.+)"
"""GSM8K's way of ending a solution; used where a text has it, whatever math-verify would find elsewhere."""


class AnswerChecker:
    """Compares final answers.

    Args:
        pattern: a regular expression; the last match's first group (or the whole match) is a text's final
            answer, and a text without a match has none. None: what follows the last "####", or the whole text.

    Raises:
        UsageError: the pattern is none.
        InputError: math-verify is not installed.
    """

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self._pattern = re.compile(MARKED_ANSWER if pattern is None else pattern)
        except re.error as error:
            raise UsageError(f"--answer-pattern {pattern}: not a regular expression ({error})") from error
        try:
            import math_verify
        except ImportError as error:
            raise InputError("answers are compared by the package math-verify: pip install math-verify") from error
        self._library: Any = math_verify
        self._needs_match = pattern is not None
        self._parsed: dict[str, Any] = {}
        self._equal: dict[tuple[str, str], bool] = {}

    def find(self, text: str) -> str | None:
        """The part of `text` that holds its final answer, or None where nothing in it can be one."""
        matches = list(self._pattern.finditer(text))
        if matches:
            last = matches[-1]
            text = _as_formula((last.group(1) if last.re.groups else last.group()) or "")
        elif self._needs_match:
            return None
        return text if self._parse(text) else None

    def is_equal(self, gold: str, found: str | None) -> bool:
        """Whether `found`, as `find` gave it, is the gold answer."""
        if found is None:
            return False
        if (gold, found) not in self._equal:
            self._equal[gold, found] = bool(self._library.verify(self._parse(gold), self._parse(found)))
        return self._equal[gold, found]

    def check_gold(self, gold: object, where: str) -> str:
        """Return a gold answer as text; of GSM8K's worked solutions, what follows the last "####".

        Raises:
            InputError: it is neither text nor number, or math-verify reads nothing in it.
        """
        text = str(gold) if isinstance(gold, (str, int, float)) and not isinstance(gold, bool) else ""
        found = _as_formula(text.rpartition("####")[2].strip())
        if not self._parse(found):
            raise InputError(f"{where} is {gold!r}: math-verify finds no answer in it. A number or formula is needed")
        return found

    def group(self, answers: Sequence[str | None]) -> list[int]:
        """Number the answers so that equal ones share a number; -1 where there is none.

        >>> AnswerChecker().group(["1/2", "7", None, "0.5"])
        [0, 1, -1, 0]
        """
        representatives: list[str] = []
        numbers: list[int] = []
        for answer in answers:
            if answer is None:
                numbers.append(-1)
                continue
            place = next((n for n, other in enumerate(representatives) if self.is_equal(other, answer)), None)
            if place is None:
                place = len(representatives)
                representatives.append(answer)
            numbers.append(place)
        return numbers

    def _parse(self, text: str) -> Any:
        """math-verify's reading of a text; an empty list where it finds nothing."""
        if text not in self._parsed:
            self._parsed[text] = self._library.parse(text)
        return self._parsed[text]


def _as_formula(text: str) -> str:
    r"""Put a bare LaTeX formula between dollars, where math-verify looks for one.

    >>> _as_formula(r"\frac{3}{4}"), _as_formula("3/4")
    ('$\\frac{3}{4}$', '3/4')
    """
    is_bare = "\\" in text and "$" not in text and "\\boxed" not in text
    return f"${text}$" if is_bare else text
