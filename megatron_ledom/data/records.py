"""What a record is, and what is wrong with one.

It owns parsing a line of JSON and checking the text in it. Where the record stands is the
caller's knowledge (`sources.py`); what happens to bad records is the pipeline's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class BadRecord(Exception):  # noqa: N818 -- a fact about the corpus, which the policy turns into an error or a log line
    """A record that is no document; its text says why."""


@dataclass(slots=True)
class Batch:
    """Consecutive rows of a slice.

    Attributes:
        texts: the texts of the good ones: a list a key.
        rows: their numbers in the slice, counted from 1.
        blank: rows of white space alone.
        bad: (row, what is wrong).
        last_row: number of the last row seen so far in the slice.
        input_bytes: bytes on disk that were read for this batch.
    """

    texts: list[list[str]]
    rows: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    last_row: int = 0
    input_bytes: int = 0

    def add(self, row: int, texts: Sequence[str]) -> None:
        """Take a good record."""
        self.rows.append(row)
        for column, text in zip(self.texts, texts, strict=True):
            column.append(text)


def new_batch(num_keys: int, input_bytes: int = 0) -> Batch:
    """Return an empty batch."""
    return Batch([[] for _ in range(num_keys)], input_bytes=input_bytes)


def fast_json() -> Callable[[bytes], Any] | None:
    """Return a faster parser that accepts nothing but valid JSON in valid UTF-8, if it is installed.

    What it refuses must be looked at by `parse_line`, which decides, and says what is wrong.
    """
    try:
        from orjson import loads
    except ImportError:
        return None
    return loads


def parse_line(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the texts of one line of JSONL.

    Raises:
        BadRecord: it is not UTF-8, not JSON, not an object, lacks a key, or holds no proper text there.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(line, error) from None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"bad JSON at column {error.colno}: {error.msg}; every line must be one JSON object") from None
    except RecursionError:
        raise BadRecord("bad JSON: nested too deeply") from None
    except ValueError as error:  # an integer of more than `sys.get_int_max_str_digits()` digits
        raise BadRecord(f"JSON that cannot be read: {str(error).partition(';')[0]}; mend or drop the line") from None
    return fields_of(record, keys)


def fields_of(record: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the texts under `keys`; raises BadRecord as `parse_line` does."""
    if type(record) is not dict:
        raise BadRecord(f"a JSON object is needed, found {_describe(record)}")
    if len(keys) == 1:
        return (_text_of(record, keys[0]),)
    return tuple(_text_of(record, key) for key in keys)


def _text_of(record: dict[str, Any], key: str) -> str:
    try:
        text = record[key]
    except KeyError:
        found = ", ".join(repr(k) for k in list(record)[:8]) or "none"
        raise BadRecord(
            f"no key {key!r} (keys found: {found}); name the right one with --json-keys (of pairs: --question-key and "
            "--answer-key)"
        ) from None
    if type(text) is not str:
        if isinstance(text, BadRecord):
            raise text
        raise BadRecord(f"the value of {key!r} must be a string, found {_describe(text)}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord(
                f"the value of {key!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}) "
                f"at character {error.start}, which is no Unicode text; mend or drop the line"
            ) from None
    return text


def decode_text(data: bytes) -> str:
    """Return plain text; raises BadRecord where it is no UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(data, error) from None


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> BadRecord:
    return BadRecord(
        f"not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1}); "
        "convert the file, for instance with iconv"
    )


def _describe(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
