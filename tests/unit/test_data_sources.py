"""Reading corpora: every format, the cut into slices, row numbers, and what is said about a bad record."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ledom.data import records as records_module
from megatron_ledom.data import sources as sources_module
from megatron_ledom.data.records import Batch
from megatron_ledom.data.sources import (
    check_inputs,
    cut_sources,
    find_sources,
    read_documents,
    read_slice,
    rows_before,
)
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.testing import english_documents, write_jsonl


@pytest.fixture(params=["compiled", "python"], autouse=True)
def _reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file with the extension and without it."""
    assert records_module.compiled_reader() is not None, "the extension _records is not built"
    if request.param == "python":
        monkeypatch.setattr(records_module, "compiled_reader", lambda: None)


def read_all(paths: list[Path], shard_bytes: int, text_unit: str = "file") -> list[tuple[str, str, int]]:
    """Every record as (file name, text, row in the file), read slice by slice."""
    sources = find_sources(paths)
    found = []
    for part in [p for shard in cut_sources(sources, shard_bytes, text_unit) for p in shard]:
        source = sources[part.source]
        base = rows_before(source, part)
        for batch in read_slice(source, part, ["text"], text_unit):
            found += [(source.path.name, t.decode(), base + r) for r, t in zip(batch.rows, batch.texts[0], strict=True)]
    return found


@pytest.mark.parametrize("shard_bytes", [1, 7, 100, 5_000, 1 << 20])
@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_slices_hold_every_line_once_with_its_number_wherever_the_cut_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, block_bytes: int
) -> None:
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", block_bytes)
    texts = ["a", "", "bb", "c" * 50, *[t[:300] for t in english_documents()[:3]], "last"]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    path.write_text("\n".join([*lines[:3], "", " ", *lines[3:]]), encoding="utf-8")
    rows = [1, 2, 3, *range(6, 6 + len(texts) - 3)]
    expected = [("a.jsonl", t, r) for t, r in zip(texts, rows, strict=True)]
    assert read_all([path], shard_bytes) == expected
    with path.open("ab") as file:
        file.write(b"\n")  # a last newline starts no line
    assert read_all([path], shard_bytes) == expected


def test_the_cut_depends_on_size_alone_and_every_byte_is_in_one_slice(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", english_documents()[i : i + 5]) for i in range(5)]
    sources = find_sources(paths)
    for shard_bytes in (1000, 20_000, 10_000_000):
        shards = cut_sources(sources, shard_bytes)
        parts = [p for shard in shards for p in shard]
        for number, source in enumerate(sources):
            mine = [(p.start, source.num_bytes if p.end < 0 else p.end) for p in parts if p.source == number]
            assert mine[0][0] == 0 and mine[-1][1] == source.num_bytes
            assert all(a[1] == b[0] for a, b in pairwise(mine))
        assert all(sum(e - s for _, s, e in shard if e >= 0) <= shard_bytes for shard in shards)


def packed(path: Path, content: bytes) -> Path:
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    half = len(content) // 2
    for suffix in pack:
        if path.name.endswith(suffix):  # two members, as `cat a.gz b.gz` makes
            content = pack[suffix](content[:half]) + pack[suffix](content[half:])
    path.write_bytes(content)
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = english_documents()[:30]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    content = plain.read_bytes()
    pq.write_table(pa.table({"id": range(30), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    for i, text in enumerate(texts):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{i:02}.txt").write_text(text, encoding="utf-8", newline="")
    expected = [(t, i) for i, t in enumerate(texts, start=1)]
    for path in (
        plain,
        packed(tmp_path / "b.jsonl.gz", content),
        packed(tmp_path / "c.jsonl.zst", content),
        packed(tmp_path / "no_suffix", content),
        tmp_path / "a.parquet",
    ):
        for shard_bytes in (3000, 1 << 30):
            assert [(t, r) for _, t, r in read_all([path], shard_bytes)] == expected, path
        assert [(d.texts[0], d.line) for d in read_documents([path])] == expected
    assert [t for _, t, _ in read_all([tmp_path / "folder"], 3000)] == texts


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_by_line_and_by_paragraph(tmp_path: Path, suffix: str) -> None:
    path = packed(tmp_path / f"a.txt{suffix}", "\ufeffone\r\n\n two \nthree\n\n\n  \nfour".encode())
    for shard_bytes in (3, 1000):
        assert [(t, r) for _, t, r in read_all([path], shard_bytes, "line")] == [
            *(("one", 1), (" two ", 3), ("three", 4), ("four", 8))
        ]
        assert [(t, r) for _, t, r in read_all([path], shard_bytes, "paragraph")] == [
            *(("one", 1), (" two \nthree", 2), ("four", 3))
        ]
    assert [t for _, t, _ in read_all([path], 3)] == ["one\r\n\n two \nthree\n\n\n  \nfour"]
    with pytest.raises(UsageError, match="--text-unit must be one of"):
        cut_sources(find_sources([path]), 3, "word")


def test_folders_and_globs_give_their_files_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "a.txt", "b/.hidden.jsonl", ".git/x.txt", "b/notes.md", "c/d/e.ndjson"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        packed(tmp_path / name, b'{"text": "x"}\n')
    found = [str(s.path.relative_to(tmp_path)) for s in find_sources([tmp_path])]
    assert found == ["a.txt", "b/1.jsonl.gz", "b/2.jsonl", "c/d/e.ndjson"]
    for pattern in (tmp_path / "b" / "*.jsonl*", Path("b/*.jsonl*")):
        monkeypatch.chdir(tmp_path)
        names = [s.path.name for s in find_sources([pattern])]
        assert names == [".hidden.jsonl", "1.jsonl.gz", "2.jsonl"]  # a glob takes what it matches
    with pytest.raises(InputError, match=r"no file matches .*\*.parquet"):
        find_sources([tmp_path / "*.parquet"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is a folder without a file named .jsonl"):
        find_sources([tmp_path / "empty"])


def test_blank_lines_carriage_returns_byte_order_mark_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two", "n": 2}\n{"n": 3, "text": ""}')
    assert [(d.texts[0], d.line) for d in read_documents([path])] == [("one", 1), ("two", 4), ("", 5)]
    first, rest = batches(path)  # a line without an end is known to be one at the end of the file
    assert (first.blank, first.rows, first.last_row) == ([2, 3], [1, 4], 4)
    assert (rest.blank, rest.rows, rest.last_row) == ([], [5], 5)


def batches(path: Path, *keys: str) -> list[Batch]:
    (source,) = find_sources([path])
    (shard,) = cut_sources([source], 1 << 30)
    return [batch for part in shard for batch in read_slice(source, part, keys or ["text"])]


def test_several_keys_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "why", "a": "because"}\n', encoding="utf-8")
    pq.write_table(pa.table({"q": ["why"], "n": [1], "a": ["because"]}), tmp_path / "a.parquet")
    for made in (path, tmp_path / "a.parquet"):
        assert next(read_documents([made], ["a", "q"])).texts == ("because", "why")


BAD_LINES = [
    (b'{"text": "a"', "bad JSON at column 13"),
    (b"text", "bad JSON at column 1"),
    (b'{"text": "a"} {}', "bad JSON at column 15"),
    (b'{"text": "\xff"}', "not UTF-8 .byte 0xff at column 11."),
    (b'["a"]', "a JSON object is needed, found a list"),
    (b'"text"', "a JSON object is needed, found a string"),
    (b"[" * 100_000, "bad JSON: nested too deeply"),
    (b'{"body": "a", "id": 3}', "no key 'text' .keys found: 'body', 'id'."),
    (b'{"text": null}', "value of 'text' must be a string, found null"),
    (b'{"text": ["a"]}', "value of 'text' must be a string, found a list"),
    (b'{"text": 1.5}', "value of 'text' must be a string, found a number"),
    (b'{"text": "ab\\ud800"}', r"half of a surrogate pair .\\ud800. at character 2"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: bytes, message: str, suffix: str) -> None:
    path = packed(tmp_path / f"corpus{suffix}", b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=f"corpus{suffix}:3: .*{message}"):
        list(read_documents([path]))


def test_all_bad_lines_of_a_batch_are_listed_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"\n".join(line for line, _ in BAD_LINES) + b'\n{"text": "last"}\n')
    (batch,) = batches(path)
    assert batch.texts == [[b"first", b"last"]]
    assert batch.rows == [1, len(BAD_LINES) + 2]
    assert [row for row, _ in batch.bad] == list(range(2, len(BAD_LINES) + 2))


def test_bad_values_of_a_parquet_file_are_named_by_row_and_a_missing_column_by_file(tmp_path: Path) -> None:
    values = pa.array([b"one", None, b"\xff", b"four"], pa.binary()).cast(pa.string(), safe=False)
    not_checked = pa.StringArray.from_buffers(4, values.buffers()[1], values.buffers()[2], values.buffers()[0], 1)
    pq.write_table(pa.table({"text": not_checked}), tmp_path / "a.parquet", row_group_size=2)
    found = batches(tmp_path / "a.parquet")
    assert [t for b in found for t in b.texts[0]] == [b"one", b"four"]
    bad = [entry for b in found for entry in b.bad]
    assert bad[0] == (2, "the value of 'text' must be a string, found null")
    assert bad[1][0] == 1  # the first of the second row group
    assert "not UTF-8 (byte 0xff at byte 1)" in bad[1][1]
    with pytest.raises(InputError, match=r"a.parquet:2: .* found null"):
        list(read_documents([tmp_path / "a.parquet"]))
    with pytest.raises(InputError, match=r"a.parquet: no column 'body' \(columns found: 'text'\)"):
        batches(tmp_path / "a.parquet", "body")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match=r"n.parquet:1: the value of 'text' must be a string, found a number"):
        list(read_documents([tmp_path / "n.parquet"]))


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(InputError, match=r"a.txt:1: not UTF-8 .byte 0xff at column 10."):
        list(read_documents([tmp_path / "a.txt"]))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.jsonl: No such file"):
        check_inputs([tmp_path / "nowhere.jsonl"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"corpus is empty: .*empty.jsonl hold 0 bytes"):
        check_inputs([tmp_path / "empty.jsonl"])
    with pytest.raises(InputError, match="no input file"):
        check_inputs([])
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no parquet PAR1")
    with pytest.raises(InputError, match=r"cannot read the input file .*x.parquet"):
        list(read_documents([tmp_path / "x.parquet"]))
    (tmp_path / "x.parquet.gz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"unpack it first"):
        find_sources([tmp_path / "x.parquet.gz"])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_or_truncated_compressed_file_is_named(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in english_documents()[:5])
    whole = packed(tmp_path / f"whole{suffix}", lines).read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 4] ^= 0xFF
    for name, content in [
        *(("cut", whole[:-20]), ("cut_one", whole[:-1]), ("flipped", bytes(damaged)), ("plain", b'{"text": "a"}\n'))
    ]:
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"cannot read the input file .*{name}{suffix}|{name}{suffix}:1: "):
            list(read_documents([path]))
