"""Scores that were computed before: an SQLite file, keyed by model, direction and text.

A block of scores is committed at once, so that a killed job has lost the block that it was at and nothing else.
The key is a hash of all that decides a score but rounding: what the model is (not where it lies), its
direction and dtype, both texts, and how they were laid out. Batches do not enter: they change a score by less
than the tolerance that `DirectedLM.score` states.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_ledom.errors import InputError

FORMAT_VERSION = 1
_PIECE_BYTES = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.distcp")
_WHOLE = (
    *("config.json", "common.pt", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)


def model_identity(folder: Path) -> str:
    """A hash of what a model is: its configuration and tokenizer, and size, beginning, middle and end of its weights.

    Three pieces of 1 MiB of each file of weights are read, so that a 7B takes milliseconds: training changes all
    of them. A copy of the folder has the same identity.

    Args:
        folder: Hugging Face's, or one iteration of Megatron's (`FolderRecord.folder`).
    """
    digest = hashlib.sha256()
    for name in _WHOLE:
        if (folder / name).is_file():
            digest.update(f"\n{name}\n".encode() + (folder / name).read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.rglob(pattern)):
        size = path.stat().st_size
        digest.update(f"\n{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, max(0, (size - _PIECE_BYTES) // 2), max(0, size - _PIECE_BYTES)):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def score_key(common: Mapping[str, Any], target: str, given: str) -> bytes:
    """The key of one score: a SHA-256 over what is common to a job and the two texts."""
    text = json.dumps([FORMAT_VERSION, common, target, given], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).digest()


class ScoreCache:
    """Scores on disk, or nowhere where `path` is None; a context manager.

    Args:
        path: made if it is not there.

    Raises:
        InputError: the file is something else, or cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            self._database = sqlite3.connect(":memory:" if path is None else path, timeout=60)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS scores "
                "(key BLOB PRIMARY KEY, logprobs BLOB NOT NULL, num_windows INTEGER NOT NULL) WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise InputError(f"--cache {path} cannot be used: {error}. Name another file, or remove it") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, tuple[list[float], int]]:
        """Return what is known: key -> log-probabilities of the tokens in natural order, and number of windows."""
        found = {}
        for key in keys:
            row = self._database.execute("SELECT logprobs, num_windows FROM scores WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = (array("d", row[0]).tolist(), row[1])
        return found

    def add(self, scores: Iterable[tuple[bytes, Sequence[float], int]]) -> None:
        """Keep (key, log-probabilities of the tokens in natural order, number of windows), all or none of them.

        Raises:
            InputError: the file system refuses, or another process holds the file.
        """
        if self.path is None:
            return
        rows = [(key, array("d", values).tobytes(), num_windows) for key, values, num_windows in scores]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise InputError(f"--cache {self.path} takes no more: {error}. Make room, or name another file") from error
