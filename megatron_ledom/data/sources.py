r"""JSONL corpora as streams of documents that know where they come from.

It owns reading, line numbers and what is wrong with a line. It knows nothing of
tokenizers or of the output. Files are cut at line ends into chunks of a fixed
size, so that the cut, and with it everything made from a chunk, does not depend on who
works on it.

    a file    {"text": ...}\n{"text": ...}\n{"text": ...}\n{"text": ...}\n
    chunks    [ first_line=1 ...              ][ first_line=3 ...        ]
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_ledom.errors import InputError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of one input file.

    Attributes:
        path: the file.
        source: its place in the list of files, counted from 0.
        first_line: the number of its first line, counted from 1.
        data: the uncompressed bytes.
        input_bytes: bytes of the file as it lies on disk that were read for this chunk.
    """

    path: Path
    source: int
    first_line: int
    data: bytes
    input_bytes: int


@dataclass(frozen=True, slots=True)
class Document:
    """One record: its texts, in the order of the keys asked for, and where it stands."""

    texts: tuple[str, ...]
    path: Path
    line: int


def check_inputs(paths: Sequence[Path]) -> int:
    """Return the size on disk of all input files together, in bytes.

    Raises:
        InputError: one is missing, is a folder, or all are empty.
    """
    if not paths:
        raise InputError("no input file was named")
    total = 0
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name the JSONL files in it, as in --input {path}/*.jsonl")
        try:
            with path.open("rb") as file:
                total += file.seek(0, 2)
        except OSError as error:
            raise InputError(f"cannot read the input file {path}: {error.strerror}") from error
    if total == 0:
        raise InputError(f"the corpus is empty: {', '.join(map(str, paths))} hold 0 bytes")
    return total


def read_documents(paths: Iterable[Path], keys: Sequence[str] = ("text",)) -> Iterator[Document]:
    """Yield every document of the files, in order.

    Raises:
        InputError: as `read_chunks` and `parse_chunk` do.
    """
    for chunk in read_chunks(paths):
        yield from parse_chunk(chunk, keys)


def read_chunks(paths: Iterable[Path], *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the files' bytes in chunks of whole lines, about `chunk_bytes` each (more where a line is longer).

    Raises:
        InputError: a file cannot be read, or a `.gz` file is damaged or truncated.
    """
    for source, path in enumerate(paths):
        try:
            with path.open("rb") as raw:
                yield from _read_file(path, source, raw, chunk_bytes)
        except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
            raise InputError(f"cannot read the input file {path}: {error}") from error


def _read_file(path: Path, source: int, raw: BinaryIO, chunk_bytes: int) -> Iterator[Chunk]:
    stream = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
    line, position, held = 1, 0, []
    while block := stream.read(chunk_bytes):
        cut = block.rfind(b"\n") + 1
        if cut == 0:  # a line longer than a block
            held.append(block)
            continue
        data = b"".join([*held, block[:cut]])
        held = [block[cut:]]
        yield Chunk(path, source, line, data, raw.tell() - position)
        line, position = line + data.count(b"\n"), raw.tell()
    if rest := b"".join(held):
        yield Chunk(path, source, line, rest, raw.tell() - position)


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> Iterator[Document]:
    """Yield the documents of a chunk; lines of white space alone are passed over.

    Args:
        chunk: whole lines.
        keys: the fields whose texts are wanted.

    Raises:
        InputError: a line is not UTF-8, not JSON, not an object, lacks a key or has no string there;
            the message starts with `file:line`.
    """
    for number, raw_line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
        if number == 1:
            raw_line = raw_line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
        if raw_line and not raw_line.isspace():
            yield Document(_parse_line(raw_line, keys, f"{chunk.path}:{number}"), chunk.path, number)


def _parse_line(raw_line: bytes, keys: Sequence[str], where: str) -> tuple[str, ...]:
    try:
        record = json.loads(raw_line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 (byte 0x{raw_line[error.start]:02x} at column {error.start + 1}); "
            "convert the file, for instance with iconv"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: bad JSON at column {error.colno}: {error.msg}; every line must be one JSON object"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: bad JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON object is needed, found {_describe(record)}")
    return tuple(_text_of(record, key, where) for key in keys)


def _text_of(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        found = ", ".join(repr(k) for k in list(record)[:8]) or "none"
        raise InputError(f"{where}: no key {key!r} (keys found: {found}); name the right one with --json-keys")
    text = record[key]
    if not isinstance(text, str):
        raise InputError(f"{where}: the value of {key!r} must be a string, found {_describe(text)}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: the value of {key!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}) "
                f"at character {error.start}, which is no Unicode text; mend or drop the line"
            ) from None
    return text


def _describe(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
