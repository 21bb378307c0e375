r"""Corpora as they arrive: which files there are, of which format, and how they are cut into slices.

It owns formats, discovery, the cut, and turning a slice into batches of records. What is
wrong with a record is said in `records.py`; tokenizers and output are not known here.

    format    files                                       a record is                  cut at
    jsonl     anything not listed below                   a line (blank ones count)    line starts, by byte range
    text      .txt                                        a file, line or paragraph    line starts (lines), else whole
    parquet   .parquet                                    a row                        row groups
    .gz, .zst behind jsonl or text: whole files

A slice owns the lines whose first byte lies in its range, so that slices that meet share no
line and lose none, and where the cut falls changes nothing:

    bytes     {"text": ...}\n{"text": ...}\n{"text": ...}\n
    slices    [ first: lines 1, 2  |  second: line 3      ]
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from megatron_ledom.data.compression import open_gzip, reading_errors
from megatron_ledom.data.records import (
    BadRecord,
    Batch,
    check_text,
    fields_of,
    new_batch,
    parse_block,
    split_lines,
)
from megatron_ledom.errors import InputError, UsageError

BLOCK_BYTES = 1 << 18  # fits a core's cache; larger ones are no faster
TEXT_UNITS = ("file", "line", "paragraph")
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet"}
_PACKED = (".gz", ".zst")
_PARQUET_ROWS = 1000  # rows decoded at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Source:
    """An input file: where, what (`format` is jsonl, text or parquet; `packed` "", ".gz" or ".zst"), how big."""

    path: Path
    format: str
    packed: str
    num_bytes: int
    mtime_ns: int


class Slice(NamedTuple):
    """Part of a source: bytes (or parquet row groups) `start` to `end`; `end` -1 is the whole file."""

    source: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Document:
    """One record: its texts, in the order of the keys asked for, and where it stands."""

    texts: tuple[str, ...]
    path: Path
    line: int


def find_sources(inputs: Sequence[Path]) -> list[Source]:
    """Return the files that `inputs` name, in order; folders and globs give their files sorted by path.

    A folder is searched to any depth for files of a known suffix; hidden ones are passed over. Links to folders are
    followed, here and by `**`; a folder that is reached twice, as in a loop of links, is searched once.

    Raises:
        InputError: something is not there or cannot be read, a folder holds no such file, or all is empty.
    """
    if not inputs:
        raise InputError("no input file was named")
    sources = [_describe_source(path) for entry in inputs for path in _expand(entry)]
    if sum(s.num_bytes for s in sources) == 0:
        raise InputError(f"the corpus is empty: {', '.join(map(str, inputs))} hold 0 bytes")
    return sources


def check_inputs(paths: Sequence[Path]) -> int:
    """Return the size on disk of all input files together, in bytes; raises as `find_sources` does."""
    return sum(source.num_bytes for source in find_sources(paths))


def _expand(entry: Path) -> list[Path]:
    if entry.is_dir():
        files = sorted(p for folder in _folders_below([entry], hidden=False) for p in folder.iterdir())
        found = [p for p in files if p.is_file() and _is_data(p.relative_to(entry))]
        if not found:
            raise InputError(f"{entry} is a folder without a file named {', '.join(_SUFFIXES)} (or with .gz, .zst)")
        return found
    if not entry.exists() and any(c in str(entry) for c in "*?["):
        root = Path(entry.anchor or ".")
        found = [p for p in sorted(_matches(root, entry.relative_to(entry.anchor).parts)) if p.is_file()]
        if not found:
            raise InputError(f"no file matches {entry}")
        return found
    return [entry]


def _matches(root: Path, parts: Sequence[str]) -> set[Path]:
    """Return what a glob of these parts gives below `root`; its `**` follows links, which `Path.glob` does not."""
    places = {root}
    while parts:
        at = parts.index("**") if "**" in parts else len(parts)
        if at:
            places = {path for place in places for path in place.glob("/".join(parts[:at]))}
        if at < len(parts):
            places = _folders_below(sorted(place for place in places if place.is_dir()), hidden=True)
        parts = parts[at + 1 :]
    return places


def _folders_below(roots: Sequence[Path], *, hidden: bool) -> set[Path]:
    """Return the roots and all folders below them; behind links only those that are not reached without them.

    Raises:
        InputError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    found, seen, starts = set(), set(), list(roots)
    for number, start in enumerate(starts):  # grows by the links, so that they come after all that is there itself
        for place, names, _ in os.walk(start, onerror=refuse):
            real = os.path.realpath(place)
            is_wanted = number < len(roots) or real not in seen
            names[:] = sorted(n for n in names if is_wanted and (hidden or not n.startswith(".")))
            if is_wanted:
                seen.add(real)
                found.add(Path(place))
                starts += [link for name in names if (link := Path(place, name)).is_symlink()]
    return found


def _is_data(path: Path) -> bool:
    name = path.with_suffix("") if path.suffix in _PACKED else path
    return name.suffix in _SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _describe_source(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            file.read(1)
        stat = path.stat()
    except OSError as error:
        raise InputError(f"cannot read the input file {path}: {error.strerror}") from error
    packed = path.suffix if path.suffix in _PACKED else ""
    kind = _SUFFIXES.get(path.with_suffix("").suffix if packed else path.suffix, "jsonl")
    if kind == "parquet" and packed:
        raise InputError(f"{path}: unpack it first; a parquet file is compressed inside")
    return Source(path, kind, packed, stat.st_size, stat.st_mtime_ns)


def cut_sources(sources: Sequence[Source], shard_bytes: int, text_unit: str = "file") -> list[list[Slice]]:
    """Cut the corpus into shards of about `shard_bytes` on disk; it depends on the arguments alone.

    Returns:
        Shards, each a list of slices, in the order of the corpus.
    """
    if text_unit not in TEXT_UNITS:
        raise UsageError(f"--text-unit must be one of {', '.join(TEXT_UNITS)}, found {text_unit}")
    shards: list[list[Slice]] = []
    room = 0
    for number, source in enumerate(sources):
        for part, num_bytes in _cut(source, number, shard_bytes, text_unit):
            if room < num_bytes or not shards:
                shards.append([])
                room = shard_bytes
            shards[-1].append(part)
            room -= num_bytes
    return shards


def _cut(source: Source, number: int, shard_bytes: int, text_unit: str) -> Iterator[tuple[Slice, int]]:
    size = source.num_bytes
    if source.format == "parquet":
        groups = _parquet_file(source.path).metadata.num_row_groups
        for group in range(groups):
            yield Slice(number, group, group + 1), size // groups
    elif source.packed or size <= shard_bytes or (source.format == "text" and text_unit != "line"):
        yield Slice(number, 0, -1), size
    else:
        pieces = -(-size // shard_bytes)
        bounds = [size * i // pieces for i in range(pieces + 1)]
        for start, end in pairwise(bounds):
            yield Slice(number, start, end), end - start


def read_slice(source: Source, part: Slice, keys: Sequence[str], text_unit: str = "file") -> Iterator[Batch]:
    """Yield the records of a slice in batches of about `BLOCK_BYTES`, in order.

    Rows are counted from 1 at the beginning of the slice. Every row of the slice is in
    exactly one batch: as a record, as a blank line, or as a bad record.

    Raises:
        InputError: the file cannot be read, is damaged or truncated, or lacks a column.
    """
    try:
        if source.format == "parquet":
            yield from _read_parquet(source.path, part, keys)
            return
        with source.path.open("rb") as raw:
            blocks = _blocks(source, raw, part)
            if source.format == "jsonl":
                yield from _jsonl(blocks, part, keys)
            elif text_unit == "file":
                yield _one_text(b"".join(block for block, _ in blocks), source.num_bytes, keys)
            elif text_unit == "line":
                yield from _text_lines(blocks, part, keys)
            else:
                yield from _text_paragraphs(blocks, part, keys)
    except reading_errors() as error:
        raise InputError(f"cannot read the input file {source.path}: {error}") from error


def rows_before(source: Source, part: Slice) -> int:
    """Count the rows of the source that lie before a slice; reads what lies before it."""
    if source.format == "parquet":
        meta = _parquet_file(source.path).metadata
        return sum(meta.row_group(i).num_rows for i in range(part.start))
    if part.start == 0:
        return 0
    with source.path.open("rb") as raw:
        return sum(block.count(b"\n") for block, _ in _blocks(source, raw, Slice(part.source, 0, part.start)))


def read_documents(paths: Iterable[Path], keys: Sequence[str] = ("text",)) -> Iterator[Document]:
    """Yield every document of the files, in order; a bad record stops it.

    Raises:
        InputError: as `find_sources` and `read_slice` do, and for the first bad record, named by file and row.
    """
    for source in find_sources(list(paths)):
        base = last = 0
        for part in [p for shard in cut_sources([source], 1 << 62) for p in shard]:
            for batch in read_slice(source, part, keys):
                if batch.bad:
                    row, why = batch.bad[0]
                    raise InputError(f"{source.path}:{base + row}: {why}")
                for row, *texts in zip(batch.rows, *batch.texts, strict=True):
                    yield Document(tuple(text.decode("utf-8") for text in texts), source.path, base + row)
                last = batch.last_row
            base += last if source.format == "parquet" else 0


def _blocks(source: Source, raw: BinaryIO, part: Slice) -> Iterator[tuple[bytes, int]]:
    """Yield whole lines, about `BLOCK_BYTES` of them at a time, and the bytes on disk that were read for them."""
    stream, left = raw, 1 << 62
    if part.end >= 0 and not source.packed:
        start = _line_start(raw, part.start)
        left = _line_start(raw, part.end) - start
        raw.seek(start)
    elif source.packed == ".gz":
        stream = cast("BinaryIO", io.BufferedReader(open_gzip(raw), BLOCK_BYTES))
    elif source.packed == ".zst":
        stream = cast("BinaryIO", io.BufferedReader(_ZstdReader(raw), BLOCK_BYTES))
    position = raw.tell()
    begun: list[bytes] = []  # the pieces of a line whose end is still to be read
    while left > 0 and (data := stream.read(min(left, BLOCK_BYTES))):
        left -= len(data)
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*begun, data[:end]]), raw.tell() - position
            position, begun = raw.tell(), []
        begun.append(data[end:])
    if last := b"".join(begun):
        yield last, raw.tell() - position


def _line_start(raw: BinaryIO, position: int) -> int:
    """Return where the first line starts that does not start before `position`."""
    if position == 0:
        return 0
    raw.seek(position - 1)
    while piece := raw.readline(BLOCK_BYTES):
        if piece.endswith(b"\n"):
            break
    return raw.tell()


class _ZstdReader(io.RawIOBase):
    """Reads all frames of a `.zst` file; unlike the library's own reader it notices that the last one was cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise InputError("reading .zst files needs the package zstandard: pip install zstandard") from error
        self._raw, self._error = raw, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._held = memoryview(b"")
        self._unread = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held and self._fill():
            pass
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def _fill(self) -> bool:
        data = self._unread or self._raw.read(1 << 17)
        self._unread = b""
        if not data:
            if self._frame is not None:
                raise EOFError("compressed file ended before the end of its last frame")
            return False
        if self._frame is None:
            self._frame = self._new()
        try:
            self._held = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise EOFError(str(error)) from error
        if self._frame.eof:
            self._unread, self._frame = self._frame.unused_data, None
        return True


def _jsonl(blocks: Iterator[tuple[bytes, int]], part: Slice, keys: Sequence[str]) -> Iterator[Batch]:
    row = 0
    for block, num_bytes in blocks:
        batch = new_batch(len(keys), num_bytes)
        if row == 0 and part.start == 0:
            block = block.removeprefix(BYTE_ORDER_MARK) or b"\n"  # some editors write it; alone it is a blank line
        parse_block(block, row + 1, keys, batch)
        row = batch.last_row
        yield batch


def _one_text(data: bytes, num_bytes: int, keys: Sequence[str]) -> Batch:
    batch = new_batch(len(keys), num_bytes)
    batch.last_row = 1
    _add_text(batch, 1, data.removeprefix(BYTE_ORDER_MARK), keys)
    return batch


def _add_text(batch: Batch, row: int, data: bytes, keys: Sequence[str]) -> None:
    try:
        batch.add(row, (check_text(data),) * len(keys))
    except BadRecord as bad:
        batch.bad.append((row, str(bad)))


def _text_lines(blocks: Iterator[tuple[bytes, int]], part: Slice, keys: Sequence[str]) -> Iterator[Batch]:
    row = 0
    for block, num_bytes in blocks:
        batch = new_batch(len(keys), num_bytes)
        for line in split_lines(block):
            row += 1
            if row == 1 and part.start == 0:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line or line.isspace():
                batch.blank.append(row)
            else:
                _add_text(batch, row, line.removesuffix(b"\r"), keys)
        batch.last_row = row
        yield batch


def _text_paragraphs(blocks: Iterator[tuple[bytes, int]], part: Slice, keys: Sequence[str]) -> Iterator[Batch]:
    """A paragraph is a run of lines that are not blank; rows count paragraphs."""
    row, held, is_first = 0, [], True
    for block, num_bytes in blocks:
        batch = new_batch(len(keys), num_bytes)
        for line in split_lines(block):
            line = line.removeprefix(BYTE_ORDER_MARK) if is_first else line
            is_first = False
            if line and not line.isspace():
                held.append(line)
            elif held:
                row += 1
                _add_text(batch, row, b"\n".join(held).removesuffix(b"\r"), keys)
                held = []
        batch.last_row = row
        yield batch
    if held:
        batch = new_batch(len(keys))
        batch.last_row = row + 1
        _add_text(batch, row + 1, b"\n".join(held).removesuffix(b"\r"), keys)
        yield batch


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=BLOCK_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read the input file {path}: {error}") from error


def _read_parquet(path: Path, part: Slice, keys: Sequence[str]) -> Iterator[Batch]:
    import pyarrow

    file = _parquet_file(path)
    missing = [key for key in keys if key not in file.schema_arrow.names]
    if missing:
        found = ", ".join(map(repr, file.schema_arrow.names[:8])) or "none"
        raise InputError(f"{path}: no column {missing[0]!r} (columns found: {found}); name it with --json-keys")
    groups = list(range(part.start, part.end if part.end >= 0 else file.metadata.num_row_groups))
    total = max(1, file.metadata.num_row_groups)
    row, told = 0, 0
    num_rows = sum(file.metadata.row_group(g).num_rows for g in groups)
    share = path.stat().st_size * len(groups) // total
    try:
        for table in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=list(keys), use_threads=False):
            batch = new_batch(len(keys))
            columns = [_values(table.column(table.schema.get_field_index(key))) for key in keys]
            for values in zip(*columns, strict=True):
                row += 1
                try:
                    batch.add(row, fields_of(dict(zip(keys, values, strict=True)), keys))
                except BadRecord as bad:
                    batch.bad.append((row, str(bad)))
            batch.last_row = row
            batch.input_bytes = share * row // max(1, num_rows) - told
            told += batch.input_bytes
            yield batch
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read the input file {path}: {error}") from error


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # one value that is no UTF-8 must not hide the others
        return [_value(item) for item in column]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {error.start + 1})")
