r"""Where a long text may be cut so that its pieces give exactly the ids of the whole.

`tokenizers` holds some 200 bytes for every token of a text while it works, so that a book takes gigabytes.
A byte-level BPE first splits a text into words with a regular expression and then never looks beyond a word;
a cut between two words that stand there in the whole text and in the pieces changes nothing. There
is always one at two kinds of places, under every expression of `_EXPRESSIONS`:

    the end of the w|ord         no word goes on after a letter with a space, and a space opens the word of the
                   ^ ^ here      letter that follows it; what is to the left ends in a run of letters either way
    a line.\nNext line           a newline never opens a word with a letter; it ends a word. It is one
             ^ here              whitespace alone, so that `\s+(?!\S)` takes it whether a letter follows or nothing

Unicode's NFC composes nothing with a space or a newline before it. Tokenizers with another normalizer, or with
any other way of splitting, are not cut. Nor is a text cut near an added token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

PIECE_CHARS = 1 << 18
# Letters of long standing: every library's tables agree on them.
_LETTER = "A-Za-z\u00e0-\u00f6\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_PLACE = re.compile(rf"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[!-~{_LETTER}]\n)(?=[{_LETTER}])")
_CONTRACTIONS, _SPACES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
# The expressions of GPT-2 (also what ByteLevel splits with), cl100k and Llama 3, Qwen 2 and 3.
_EXPRESSIONS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    *(
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
)


class Cutter:
    """Cuts texts for one tokenizer.

    Args:
        content: its `tokenizer.json`.

    Attributes:
        can_cut: whether the tokenizer is of a kind for which pieces are exact.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._added = [token["content"] for token in content["added_tokens"]]
        self._reach = max(map(len, self._added), default=0) + 1
        steps = content.get("pre_tokenizer") or {}
        steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
        self.can_cut = (
            (content.get("normalizer") or {"type": "NFC"}) == {"type": "NFC"}
            and content["model"]["type"] == "BPE"
            and all(map(_is_known, steps))
            and any(map(_splits_words, steps))
            and steps[-1]["type"] == "ByteLevel"
        )

    def cut(self, text: str, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
        """Yield the pieces of a text, in order, of `piece_chars` characters or somewhat more each but the last."""
        start = 0
        if self.can_cut:
            while (end := self._place(text, start + piece_chars)) is not None:
                yield text[start:end]
                start = end
        yield text[start:]

    def _place(self, text: str, after: int) -> int | None:
        """Return the first place from `after` on where the text may be cut."""
        for found in _PLACE.finditer(text, after):
            end = found.start()
            around = text[max(0, end - self._reach) : end + self._reach]
            if not any(token in around for token in self._added):
                return end
        return None


def _is_known(step: dict[str, Any]) -> bool:
    """Whether a step of the splitting is one for which the places of this module hold."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return not step.get("add_prefix_space", True)
    if kind == "Split":
        return (
            step.get("pattern", {}).get("Regex") in _EXPRESSIONS
            and step.get("behavior") == "Isolated"
            and not step.get("invert")
        )
    return kind == "Digits"


def _splits_words(step: dict[str, Any]) -> bool:
    return step["type"] == "Split" or (step["type"] == "ByteLevel" and step.get("use_regex", True))
