"""JSONL in and results out: bad lines are named, output is whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ledom.errors import InputError, OutputExistsError, UsageError
from megatron_ledom.inference.files import check_output, open_output, read_records


def test_records_carry_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \r\n{"a": "\xc3\xa9"}')
    assert list(read_records(path)) == [(1, {"a": 1}), (4, {"a": "\u00e9"})]
    path.write_bytes(rb'{"a": "\ud83d\ude00"}')
    assert list(read_records(path)) == [(1, {"a": "\U0001f600"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "line 2: not JSON"),
        (b"[1]", "line 2: a JSON list, an object is needed"),
        (b'{"a": "\xff"}', "line 2: not UTF-8"),
        (b'{"a": "x", "b": ["\\ud83d"]}', r"line 2: holds half of a surrogate pair \(\\ud83d\)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=message) as raised:
        list(read_records(path))
    assert str(path) in str(raised.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_records(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="a folder"):
        list(read_records(tmp_path))


def test_output_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_output(path) as file:
        file.write("one\n")
        assert not path.exists()
    assert path.read_text() == "one\n"
    with pytest.raises(RuntimeError), open_output(path) as file:
        file.write("two\n")
        raise RuntimeError
    assert path.read_text() == "one\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    check_output(path, overwrite=False)
    path.write_text("")
    check_output(path, overwrite=True)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_output(path, overwrite=False)
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="there is no folder"):
        check_output(tmp_path / "absent" / "out.jsonl", overwrite=False)
