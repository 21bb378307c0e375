"""A tokenizer in a process of its own, so that it loads while this one does something else.

A tokenizer takes a tenth of a second to load and as long to be told from others (its fingerprint); a small corpus
is tokenised in that time. The process answers one question at a time, works out the fingerprint while there is none,
and ends with this one:

    this process    fork  import    ask  load gigatoken ....  take    workers tokenise ........  fingerprint
    the other       load ..............  answer  fingerprint ..............

No question is sent before the last answer has come: both would wait for the other where neither fits into the pipe.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.data.tokenizers import Answer, Tokenizer, load_tokenizer
from megatron_ledom.data.workers import has_one_thread
from megatron_ledom.errors import InputError, LedomError

if TYPE_CHECKING:
    import numpy as np

_FACTS = ("files", "vocab_size", "eod_id", "library")


@contextlib.contextmanager
def load_aside(
    tokenizer_type: str, model: str | None, vocab_file: str | None = None, merge_file: str | None = None
) -> Iterator[Tokenizer]:
    """Give a tokenizer that is still loading, in a process that ends with the block; arguments as `load_tokenizer`.

    What loading raises is raised when the tokenizer is used first. A process with threads cannot be
    forked safely, so there the tokenizer is loaded at once, in this process.
    """
    if not has_one_thread():
        yield load_tokenizer(tokenizer_type, model, vocab_file=vocab_file, merge_file=merge_file)
        return
    context = multiprocessing.get_context("fork")
    connection, theirs = context.Pipe()
    origin = (tokenizer_type, model, vocab_file, merge_file)
    process = context.Process(target=_serve, args=(origin, theirs, connection), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _AsideTokenizer(origin, connection)
    finally:
        connection.close()
        process.kill()
        process.join()


class _Answer:
    """What is still to come of the other process; see `Answer`."""

    def __init__(self, tokenizer: _AsideTokenizer, after: _Answer | None = None) -> None:
        self.found: tuple[Exception | None, Any] | None = None
        self._tokenizer, self._after = tokenizer, after

    def __call__(self) -> Any:
        if self._after is not None:
            self._after()  # what hindered it from loading comes first
        self._tokenizer.receive(self)
        assert self.found is not None
        error, value = self.found
        if error is not None:
            raise error
        return value

    def is_there(self) -> bool:
        return self._tokenizer.has_received(self)


class _AsideTokenizer(Tokenizer):
    """A tokenizer that another process holds. Only the process that made it may ask it; a pickled one loads itself."""

    def __init__(self, origin: tuple[Any, ...], connection: Connection) -> None:
        self.type, model, vocab_file, _ = origin
        self.model = str(model if model is not None else vocab_file)
        self.origin = origin
        self._connection = connection
        self._awaited: deque[_Answer] = deque()  # in the order in which they will come
        self._facts = _Answer(self)  # what it says first
        self._awaited.append(self._facts)

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return self._facts()[name]
        raise AttributeError(name)

    @cached_property
    def fingerprint(self) -> str:
        return self._ask("fingerprint")

    def ask_ahead(self, name: str, *arguments: Any) -> Answer:
        """Send a question now."""
        if unanswered := [answer for answer in self._awaited if answer is not self._facts]:
            self._facts()
            self.receive(unanswered[-1])
        with contextlib.suppress(BrokenPipeError):  # it has said before why it ended, or was killed
            self._connection.send((name, arguments))
        self._awaited.append(_Answer(self, after=self._facts))
        return self._awaited[-1]

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self.ask_ahead(name, *arguments)()

    def has_received(self, answer: _Answer) -> bool:
        """Take what has come; whether the answer is there, or the process ended without it."""
        while answer.found is None and self._connection.poll():
            try:
                self._take_next()
            except (EOFError, ConnectionResetError):  # `receive` says so
                return True
        return answer.found is not None

    def _take_next(self) -> None:
        self._awaited[0].found = self._connection.recv()
        self._awaited.popleft()

    def receive(self, answer: _Answer) -> None:
        """Take what comes until the answer is there."""
        try:
            while answer.found is None:
                self._take_next()
        except (EOFError, ConnectionResetError):
            raise InputError(
                f"the process that loads {self.type} {self.model} was killed; out of memory? Try fewer --workers"
            ) from None

    def here(self) -> Tokenizer:
        """Return the same tokenizer, loaded in this process."""
        kind, model, vocab_file, merge_file = self.origin
        return load_tokenizer(kind, model, vocab_file=vocab_file, merge_file=merge_file)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._ask("encode_batch", list(texts))

    def encode_short(self, texts: Sequence[str]) -> list[list[int]]:
        return self._ask("encode_short", list(texts))

    def decode(self, ids_nat: Sequence[int] | np.ndarray) -> str:
        return self._ask("decode", ids_nat)

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return self._ask("encode_with_starts", text)

    def content(self) -> str | bytes:
        path = Path(self.model) / "tokenizer.json"
        if self.type == "HuggingFaceTokenizer" and path.is_file():  # no need to wait for it
            return path.read_text(encoding="utf-8")
        return self._ask("content")

    def special_texts(self) -> list[str]:
        return self._ask("special_texts")


def _serve(origin: tuple[Any, ...], connection: Connection, theirs: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    theirs.close()
    gc.disable()  # a vocabulary is many objects without a cycle, and looking for one takes a third of the time
    try:
        kind, model, vocab_file, merge_file = origin
        tokenizer = load_tokenizer(kind, model, vocab_file=vocab_file, merge_file=merge_file)
        connection.send((None, {name: getattr(tokenizer, name) for name in _FACTS}))
        while True:
            if not connection.poll():
                _ = tokenizer.fingerprint  # it will be asked for
            name, arguments = connection.recv()
            asked = getattr(tokenizer, name)
            connection.send((None, asked(*arguments) if callable(asked) else asked))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody asks any more
        return
    except LedomError as error:
        connection.send((error, None))
    except Exception as error:
        # what encoding raises is told apart by its type; see Tokenizer.encode_batch
        known = type(error) if type(error) in (TypeError, ValueError) else RuntimeError
        connection.send((known(f"in the tokenizer's process:\n{traceback.format_exc()}"), None))
