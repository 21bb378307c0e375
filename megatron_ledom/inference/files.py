"""JSONL in, results out, for the tools that use a model.

Owns two promises: a bad line is named by file and number, and a result file
appears whole or not at all. It knows nothing about what the records mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_ledom.errors import InputError, OutputExistsError, UsageError


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) of a JSONL file; empty lines are passed over.

    Raises:
        InputError: the file is missing or not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found}. A JSONL file is needed")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_line(line, f"{path}, line {number}")


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}). Convert the file") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}). Mend or remove the line") from error
    if b"\\ud" in line.lower():
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise InputError(
                f"{where}: holds half of a surrogate pair (\\u{half:04x}), which is no Unicode text. Mend or remove it"
            ) from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, an object is needed. Mend or remove the line")
    return record


def read_text_field(record: dict[str, Any], key: str, where: str) -> str:
    """Return the text under `key` of one record.

    Raises:
        InputError: it is absent, not text, or blank; the message names `where`.
    """
    if key not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise InputError(f"{where}: no field {key!r}; fields found: {known}. Add it")
    text = record[key]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {key!r} is {text!r}, a text is needed")
    if not text.strip():
        raise InputError(f"{where}: field {key!r} is empty, and an empty text cannot be scored. Remove it")
    return text


def check_output(path: str | Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, or whose folder doesn't, before any work is done.

    Raises:
        OutputExistsError: the file exists and `overwrite` is not set.
        UsageError: the folder to write into is missing, or the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder. Name a file")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"--output {path} exists. Choose another name, or add --overwrite")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}. Make it first")


@contextmanager
def open_output(path: str | Path) -> Iterator[TextIO]:
    """Open `path` for writing text; it appears under its name when the block ends without an exception."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
