"""Reading JSONL: order, line numbers, compression, and what is said about a bad line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_ledom.data.sources import check_inputs, parse_chunk, read_chunks, read_documents
from megatron_ledom.errors import InputError
from megatron_ledom.testing import english_documents, write_jsonl


@pytest.mark.parametrize("chunk_bytes", [1, 100, 5_000, 1 << 20])
def test_chunks_are_whole_lines_with_the_right_numbers_whatever_their_size(tmp_path: Path, chunk_bytes: int) -> None:
    texts = english_documents()[:20]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    chunks = list(read_chunks([path], chunk_bytes=chunk_bytes))
    assert b"".join(c.data for c in chunks) == path.read_bytes()
    assert sum(c.input_bytes for c in chunks) == path.stat().st_size
    documents = [d for c in chunks for d in parse_chunk(c, ["text"])]
    assert [d.texts[0] for d in documents] == texts
    assert [d.line for d in documents] == list(range(1, 21))


def test_files_follow_each_other_and_gzip_reads_the_same(tmp_path: Path) -> None:
    texts = english_documents()[:6]
    plain = write_jsonl(tmp_path / "a.jsonl", texts[:3])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(write_jsonl(tmp_path / "b", texts[3:]).read_bytes()))
    documents = list(read_documents([plain, packed]))
    assert [d.texts[0] for d in documents] == texts
    assert [(d.path, d.line) for d in documents[2:4]] == [(plain, 3), (packed, 1)]
    assert sum(c.input_bytes for c in read_chunks([plain, packed], chunk_bytes=500)) == check_inputs([plain, packed])


def test_blank_lines_carriage_returns_byte_order_mark_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two", "n": 2}\n{"n": 3, "text": ""}')
    assert [(d.texts[0], d.line) for d in read_documents([path])] == [("one", 1), ("two", 4), ("", 5)]


def test_several_keys_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "why", "a": "because"}\n', encoding="utf-8")
    assert next(read_documents([path], ["a", "q"])).texts == ("because", "why")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "bad JSON at column 13"),
        (b"text", "bad JSON at column 1"),
        (b'{"text": "\xff"}', "not UTF-8 .byte 0xff at column 11."),
        (b'["a"]', "a JSON object is needed, found a list"),
        (b"[" * 100_000, "bad JSON: nested too deeply"),
        (b'{"body": "a", "id": 3}', "no key 'text' .keys found: 'body', 'id'."),
        (b'{"text": null}', "value of 'text' must be a string, found null"),
        (b'{"text": ["a"]}', "value of 'text' must be a string, found a list"),
        (b'{"text": 1.5}', "value of 'text' must be a string, found a number"),
        (b'{"text": "ab\\ud800"}', r"half of a surrogate pair .\\ud800. at character 2"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=f"corpus.jsonl:3: .*{message}"):
        list(read_documents([path]))


def test_the_line_number_holds_behind_many_chunks(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' * 999 + "{bad\n", encoding="utf-8")
    chunks = read_chunks([path], chunk_bytes=1000)
    with pytest.raises(InputError, match=r"corpus.jsonl:1000: bad JSON"):
        for chunk in chunks:
            list(parse_chunk(chunk, ["text"]))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.jsonl: No such file"):
        check_inputs([tmp_path / "nowhere.jsonl"])
    with pytest.raises(InputError, match="is a folder"):
        check_inputs([tmp_path])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"corpus is empty: .*empty.jsonl hold 0 bytes"):
        check_inputs([tmp_path / "empty.jsonl"])
    with pytest.raises(InputError, match="no input file"):
        check_inputs([])


def test_a_damaged_or_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in english_documents()[:5]))
    damaged = bytearray(packed)
    damaged[len(damaged) // 2] ^= 0xFF
    for name, content in [("cut", packed[:-20]), ("flipped", bytes(damaged)), ("plain", b'{"text": "a"}\n')]:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"cannot read the input file .*{name}.gz"):
            list(read_chunks([path]))
