"""What a record is, and what is wrong with one.

It owns parsing lines of JSON and checking the text in them. Texts are UTF-8 from here on: bytes, which were
checked. Lines that are good beyond doubt are read by the extension `_records` (csrc/records); the others, and all where
it was not built, by Python's json, which decides what a record is and says what is wrong. Where the record stands is
the caller's knowledge (`sources.py`); what happens to bad records is the pipeline's.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_INTERFACE = 1  # kInterface of csrc/bindings/records.cpp

# The texts of whole lines: for every key a list with the text of each line, or None for a line that Python must read;
# and (number, begin, end) of each of these, in bytes, without its newline.
ReadTexts = Callable[[bytes, list[str]], tuple[list[list[bytes | None]], list[tuple[int, int, int]]]]


class BadRecord(Exception):  # noqa: N818 -- a fact about the corpus, which the policy turns into an error or a log line
    """A record that is no document; its text says why."""


@dataclass(slots=True)
class Batch:
    """Consecutive rows of a slice.

    Attributes:
        texts: the texts of the good ones: a list a key; UTF-8.
        rows: their numbers in the slice, counted from 1.
        blank: rows of white space alone.
        bad: (row, what is wrong).
        last_row: number of the last row seen so far in the slice.
        input_bytes: bytes on disk that were read for this batch.
    """

    texts: list[list[bytes]]
    rows: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    last_row: int = 0
    input_bytes: int = 0

    def add(self, row: int, texts: Sequence[bytes]) -> None:
        """Take a good record."""
        self.rows.append(row)
        for column, text in zip(self.texts, texts, strict=True):
            column.append(text)


def new_batch(num_keys: int, input_bytes: int = 0) -> Batch:
    """Return an empty batch."""
    return Batch([[] for _ in range(num_keys)], input_bytes=input_bytes)


@functools.cache
def compiled_reader() -> ReadTexts | None:
    """Return `read_texts` of the extension; None where it is not built, or of another version."""
    try:
        module = importlib.import_module("megatron_ledom.data._records")
    except ImportError:
        return None
    return module.read_texts if getattr(module, "INTERFACE", None) == _INTERFACE else None


def parse_block(block: bytes, first_row: int, keys: Sequence[str], batch: Batch) -> None:
    """Add the rows of whole lines of JSONL to a batch: as a record, as a blank line, or as a bad record.

    Args:
        block: one line or more; the last one may lack its newline.
        first_row: the number of the first.
        keys: the fields to take.
        batch: an empty one; changed.
    """
    reader = compiled_reader()
    if reader is None:
        lines = split_lines(block)
        columns: list[list[bytes | None]] = [[None] * len(lines) for _ in keys]
        odd = [(number, line) for number, line in enumerate(lines)]
    else:
        columns, places = reader(block, list(keys))
        odd = [(number, block[begin:end]) for number, begin, end in places]
    rows: list[int] | range = range(first_row, first_row + len(columns[0]))
    batch.last_row = rows[-1]
    for number, line in odd:
        if not line or line.isspace():
            batch.blank.append(rows[number])
            continue
        try:
            for column, text in zip(columns, parse_line(line, keys), strict=True):
                column[number] = text
        except BadRecord as bad:
            batch.bad.append((rows[number], str(bad)))
    if batch.blank or batch.bad:
        rows = [row for row, text in zip(rows, columns[0], strict=True) if text is not None]
        columns = [[text for text in column if text is not None] for column in columns]
    batch.rows, batch.texts = list(rows), columns  # type: ignore[assignment]


def split_lines(block: bytes) -> list[bytes]:
    """Split whole lines, of which the last may lack its newline; without newlines."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_line(line: bytes, keys: Sequence[str]) -> tuple[bytes, ...]:
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


def fields_of(record: Any, keys: Sequence[str]) -> tuple[bytes, ...]:
    """Return the texts under `keys`; raises BadRecord as `parse_line` does."""
    if type(record) is not dict:
        raise BadRecord(f"a JSON object is needed, found {_describe(record)}")
    if len(keys) == 1:
        return (_text_of(record, keys[0]),)
    return tuple(_text_of(record, key) for key in keys)


def _text_of(record: dict[str, Any], key: str) -> bytes:
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
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"the value of {key!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}) "
            f"at character {error.start}, which is no Unicode text; mend or drop the line"
        ) from None


def check_text(data: bytes) -> bytes:
    """Return plain text as it is; raises BadRecord where it is no UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(data, error) from None
    return data


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> BadRecord:
    return BadRecord(
        f"not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1}); "
        "convert the file, for instance with iconv"
    )


def _describe(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
