"""The compiled reader of JSONL against Python's json: what it reads is the same, and what it leaves is little."""

from __future__ import annotations

import json
import random
import types
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ledom.data import records
from megatron_ledom.data.records import BadRecord, compiled_reader, new_batch, parse_block, parse_line
from megatron_ledom.testing import english_documents

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text('ab\\"/\n\t\x7f\u00e9\u6771\U0001f642')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def read(block: bytes, *keys: str) -> tuple[list[list[bytes | None]], list[tuple[int, int, int]]]:
    reader = compiled_reader()
    assert reader is not None, "the extension _records is not built"
    return reader(block, list(keys))


def right_texts(line: bytes, keys: list[str]) -> tuple[bytes, ...] | None:
    try:
        return parse_line(line, keys)
    except BadRecord:
        return None


@given(JSON, TEXTS, st.booleans(), st.sampled_from([None, (",", ":"), (" ,\t", "\r: ")]))
def test_what_a_writer_of_json_writes_is_read(more: Any, text: str, is_ascii: bool, separators: Any) -> None:
    record = {"id": more, "text": text, "more": [more, {"text": 1}]}
    line = json.dumps(record, ensure_ascii=is_ascii, separators=separators).encode()
    assert read(line, "text") == ([[text.encode()]], [])
    assert read(line + b"\n" + line + b"\n", "text", "text") == ([[text.encode()] * 2] * 2, [])


def test_a_corpus_is_read_without_python() -> None:
    block = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in english_documents())
    columns, odd = read(block, "text")
    assert columns == [[text.encode() for text in english_documents()]] and not odd


PIECES = [
    *(
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b" ",
        b"\t",
        b"\r",
        b"\x00",
        b"\x1f",
        b"\x7f",
        b"0",
        b"-",
        b".5",
        b"e+9",
    ),
    *(
        b"NaN",
        b"Infinity",
        b"null",
        b"true",
        b"fals",
        b'"text"',
        b'"text": "b"',
        b"\\u0041",
        b"\\ud83d\\ude42",
        b"\\ud83d",
    ),
    *(
        b"\\udead",
        b"\\uD83Dx",
        b"\\u12",
        b"\\x",
        b"\\/",
        b"\xc3\xa9",
        b"\xc3",
        b"\xe6\x9d\xb1",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x99\x82",
    ),
    *(b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xff", b"a" * 17, b"1" * 1001, b"\xef\xbb\xbf"),
]


@settings(max_examples=2000)
@given(st.data())
def test_what_is_read_of_damaged_lines_is_what_json_reads(data: st.DataObject) -> None:
    record = {"id": data.draw(JSON), "text": data.draw(TEXTS), "é": "c"}
    line = bytearray(json.dumps(record, ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(line)))
        line[place : place + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(PIECES) | st.binary(max_size=2))
    keys = data.draw(st.sampled_from([["text"], ["text", "é"], ["id"]]))
    block = bytes(line.replace(b"\n", b""))
    columns, odd = read(block, *keys)
    if block and not odd:
        assert tuple(column[0] for column in columns) == right_texts(block, keys)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "text": "b"}',
        b'{"text": "a", "te\\u0078t": "b"}',
        b'{"te\\u0078t": "b"}',
        b'{"text": "a", "n": NaN}',
        b'{"text": "a", "n": 1e999, "m": -0.0E-1}',
        b'{"text": "a", "n": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"text": "a", "n": ' + b"1" * 2000 + b"}",
        b'{"text": "a", "n": "\\ud800"}',
        b' \t{"text" :"\\u0000\\"" }\r',
        b'{"text": "\\ud83d\\ude42\xf0\x9f\x99\x82"}',
    ],
)
def test_a_line_that_is_left_to_python_is_no_other_record(line: bytes) -> None:
    batch = new_batch(1)
    parse_block(line + b"\n", 5, ["text"], batch)
    assert (batch.rows, batch.texts, batch.blank, batch.bad, batch.last_row) == (
        [5],
        [list(parse_line(line, ["text"]))],
        [],
        [],
        5,
    )


@given(
    st.lists(
        st.sampled_from([b"", b" ", b"{}", b'{"text": 1}', b"\xff", b'{"te\\u0078t": "odd"}', b'{"text": "even"}'])
    )
)
@example([b""])
def test_rows_are_the_same_with_and_without_the_extension(lines: list[bytes]) -> None:
    for block in {b"\n".join(lines), b"\n".join(lines) + b"\n"} - {b""}:
        found = []
        for reader in (compiled_reader(), None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(records, "compiled_reader", lambda reader=reader: reader)
                found.append(new_batch(1))
                parse_block(block, 1, ["text"], found[-1])
        assert found[0] == found[1]
        assert found[0].last_row == len(found[0].rows) + len(found[0].blank) + len(found[0].bad)


def test_texts_beyond_ascii_are_read_at_every_offset() -> None:
    rng = random.Random(3)
    for length in range(70):
        text = "".join(rng.choice('abcdefghijklmnop\n"é東🙂') for _ in range(length))
        for is_ascii in (False, True):
            line = json.dumps({"text": text}, ensure_ascii=is_ascii).encode()
            assert read(line, "text") == ([[text.encode()]], []), line


def test_an_extension_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_reader.cache_clear()
    older = types.SimpleNamespace(read_texts=print)
    monkeypatch.setattr(records.importlib, "import_module", lambda name: older)
    assert compiled_reader() is None
    older.INTERFACE = records._INTERFACE
    compiled_reader.cache_clear()
    assert compiled_reader() is print
    compiled_reader.cache_clear()
