"""The fastest library that gives exactly the tokenizer's own ids.

`gigatoken` tokenises many times faster than `tokenizers` and `sentencepiece`, but does not
know every tokenizer. It is used only after it has given the reference's ids for texts made to
tell libraries apart and for a sample of the corpus itself; every worker goes on comparing
a document now and then. This module owns that choice; what the right ids are is
decided by `tokenizers.py` alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ledom.data.tokenizers import PROBE_TEXTS, Tokenizer
from megatron_ledom.errors import LedomError, TokenizerMismatchError, UsageError
from megatron_ledom.log import get_logger

FAST = "gigatoken"
BACKENDS = ("auto", FAST, "tokenizers", "sentencepiece")
_CACHE_BYTES = 144 << 20  # a worker's tokenizer may remember this much of what it has seen
_WATCHED_BYTES = 2 << 20  # and is looked at after so much text
_MAX_SPECIAL = 400
_MAX_AVOIDED = 16  # each costs a search of every text
# Ranges whose characters libraries have been seen to treat differently; see `_mixed_texts`.
_RANGES = (
    *((0x20, 0x7E), (0x00, 0x1F), (0x7F, 0xFF), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F)),
    *((0xE00, 0xE7F), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x24FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF)),
    *((0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x10300, 0x104FF)),
    *((0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0xE0000, 0xE007F)),
)
_EXTRA = (
    "",
    " ",
    "\n",
    "\r\n\r\n  \t x\u00a0y\u2003z\u200b",
    "I'll we've THEY'RE it\u2019s d'Or 'S 'LL",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F \u0661\u0662 \u2167 \u00bd",
    "a" * 3000 + " " + "=" * 500 + " " * 300 + "\n" * 200,
    "def f(x):\n\treturn {'a': [1, 2], \"b\": x!=y}  # ok\n\n\n    if x:\n        pass\n",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f e\u0301 \u1e9b\u0323 \ufb01",
    "_under_score CamelCaseWord ALLCAPS mixed123abc \u2581 \u2581\u2581x \u0120 \u010a <0x0A> ##ing",
)


class Encoder(Protocol):
    """What makes ids out of texts in UTF-8: natural order, no special token added; one integer array [n] a text."""

    name: str

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of each text, which must be valid UTF-8."""


class ReferenceEncoder:
    """The tokenizer's own library.

    It works in a thread: half of its time goes into small pieces of memory, and a thread takes these from an arena of
    its own, where they lie close together, and not from between the words of the vocabulary (a fifth less time).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name, self._tokenizer = tokenizer.library, tokenizer.here()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it is made of."""
        return ReferenceEncoder, (self._tokenizer,)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        # It ends with this object. One for all batches: the library keeps words by thread, and memory stays flat.
        return ThreadPoolExecutor(1)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of each text; int32."""
        return self._thread.submit(self._tokenizer.encode_batch, [text.decode("utf-8") for text in texts]).result()


class FastEncoder:
    """`gigatoken`, which is loaded anew when what it remembers of the words it has seen takes too much memory.

    Args:
        tokenizer: the reference.
        avoid: special tokens that gigatoken treats otherwise; a text that holds one goes to the reference.

    Raises:
        Exception: of whatever kind, where gigatoken does not know the tokenizer.
    """

    name = FAST

    def __init__(self, tokenizer: Tokenizer, avoid: Sequence[str] = ()) -> None:
        content = tokenizer.content()
        self.avoid, self._reference = tuple(avoid), tokenizer
        self._load: Callable[[], Any] = lambda: _load_fast(content)
        self._encode = self._load().encode
        self._limit_bytes, self._unseen_bytes = resident_bytes() + _CACHE_BYTES, 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it is made of."""
        return FastEncoder, (self._reference, self.avoid)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of each text; uint32."""
        self._unseen_bytes += sum(map(len, texts))
        if self._unseen_bytes > _WATCHED_BYTES:
            self._unseen_bytes = 0
            if resident_bytes() > self._limit_bytes:
                self._encode = self._load().encode
                self._limit_bytes = resident_bytes() + _CACHE_BYTES
        encode = self._encode
        if not self.avoid:
            return [encode(text) for text in texts]
        avoided = [token.encode("utf-8") for token in self.avoid]
        return [self._right.encode(t.decode("utf-8")) if any(a in t for a in avoided) else encode(t) for t in texts]

    @cached_property
    def _right(self) -> Tokenizer:
        return self._reference.here()


def _load_fast(content: str | bytes) -> Any:
    from gigatoken import Tokenizer as FastTokenizer
    from gigatoken.gigatoken_rs import load_hf_json

    return FastTokenizer.from_sentencepiece(content).backend if isinstance(content, bytes) else load_hf_json(content)


def resident_bytes() -> int:
    """The memory that this process holds now."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * 4096


def choose_backend(tokenizer: Tokenizer, asked: str, corpus_texts: Iterable[str]) -> Encoder:
    """Return the fastest encoder that is exact; says so on the log where the fast one is not.

    Args:
        tokenizer: the reference.
        asked: one of `BACKENDS`.
        corpus_texts: a sample of the corpus, compared besides the texts made for it.

    Raises:
        UsageError: `asked` does not fit the tokenizer.
        TokenizerMismatchError: gigatoken was asked for by name and cannot be used.
    """
    if asked not in ("auto", FAST):
        if asked != tokenizer.library:
            raise UsageError(
                f"--tokenizer-backend {asked} cannot run {tokenizer.type}; use auto, {FAST} or {tokenizer.library}"
            )
        return ReferenceEncoder(tokenizer)
    texts = [*probe_texts(), *corpus_texts]  # here, so that trouble with the corpus is not taken for the tokenizer's
    answers = tokenizer.ask_ahead("answer_probes", _MAX_SPECIAL, texts)
    why = None
    try:
        fast = FastEncoder(tokenizer)  # loads while the tokenizer still does, where that has a process of its own
        samples, right_ids = answers()
        avoid = [token for token, text, ids in samples if first_difference(tokenizer, fast, [text], [ids])]
        fast.avoid = tuple(avoid) if len(avoid) <= _MAX_AVOIDED else ()
        right_ids = [*(ids for _, _, ids in samples), *right_ids]
        why = first_difference(tokenizer, fast, [*(text for _, text, _ in samples), *texts], right_ids)
    except LedomError:  # of the reference itself
        raise
    except ImportError:
        why = "it is not installed (pip install gigatoken)"
    except Exception as error:  # whatever a library says of a tokenizer that it does not know
        why = f"it cannot load this tokenizer: {_first_line(error)}"
    except BaseException as error:  # a panic of the Rust library is no Exception
        if type(error).__name__ != "PanicException":
            raise
        why = f"it broke on this tokenizer: {_first_line(error)}"
    if why is None:
        return fast
    if asked == FAST:
        raise TokenizerMismatchError(f"--tokenizer-backend {FAST} cannot be used: {why}. Use auto")
    get_logger(__name__).warning("%s is not used: %s. Tokenising with %s", FAST, why, tokenizer.library)
    return ReferenceEncoder(tokenizer)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def first_difference(
    tokenizer: Tokenizer, fast: Encoder, texts: Sequence[str], right_ids: Sequence[Sequence[int]] | None = None
) -> str | None:
    """Say where an encoder first departs from the reference, whose ids may be given; None where all are equal."""
    right_ids = tokenizer.encode_short(texts) if right_ids is None else right_ids
    for text, right_list in zip(texts, right_ids, strict=True):
        right = np.array(right_list, dtype=np.int32)
        (found,) = fast.encode_batch([text.encode("utf-8")])
        if len(found) != len(right) or not np.array_equal(found, right):
            unequal = np.flatnonzero(found[: len(right)] != right[: len(found)])
            at = int(unequal[0]) if len(unequal) else min(len(found), len(right))
            return (
                f"ids differ for {text[:60]!r}: token {at} is {found[at : at + 3].tolist()}, "
                f"{tokenizer.library} gives {right[at : at + 3].tolist()}"
            )
    return None


def probe_texts() -> list[str]:
    """Texts that tell libraries apart: scripts, spaces, digits, code."""
    return [*PROBE_TEXTS, *_EXTRA, *_mixed_texts()]


def _mixed_texts() -> list[str]:
    """Twenty seeded mixtures of the scripts of the world, words of one script at a time."""
    rng = random.Random(0)
    texts = []
    for _ in range(20):
        words = []
        for _ in range(60):
            low, high = rng.choice(_RANGES)
            words.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))))
        texts.append("".join(word + rng.choice(("", " ", "  ", "\n")) for word in words))
    return texts
