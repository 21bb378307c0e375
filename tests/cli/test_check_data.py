"""tools/check_data.py as a user runs it: sound, faulty, unreadable, and one document shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ledom.testing import END_OF_DOCUMENT, english_documents, run_tool, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    corpus = write_jsonl(folder / "a.jsonl", ["Once upon a time", "", *english_documents()[:20]])
    done = run_tool(
        "preprocess_data.py",
        *("--input", corpus, "--output-prefix", folder / "x", "--append-eod"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder),
    )
    assert done.returncode == 0, done.stderr
    return folder / "x_text_document"


def test_a_sound_dataset_gives_status_zero_and_says_what_it_is(made: Path, tokenizer_folder: Path) -> None:
    done = run_tool("check_data.py", made)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"{made} is sound: 21 documents, ")
    assert done.stdout.endswith("tokens, reverse (token), made with HuggingFaceTokenizer\n")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder, "--json")
    found = json.loads(run_tool("check_data.py", made, *flags).stdout)
    assert (found["is_sound"], found["faults"], found["documents"]) == (True, [], 21)


def test_faults_give_status_one_with_document_source_and_row(made: Path, tmp_path: Path) -> None:
    prefix = Path(shutil.copytree(made.parent, tmp_path / "copy")) / made.name
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[-5] ^= 64
    Path(f"{prefix}.bin").write_bytes(content)
    done = run_tool("check_data.py", prefix)
    assert done.returncode == 1
    assert f"{prefix}.bin: document 20 ({made.parent}/a.jsonl, row 22) does not fit its CRC-32" in done.stdout
    found = json.loads(run_tool("check_data.py", prefix, "--json").stdout)
    assert found["is_sound"] is False
    assert len(found["faults"]) >= 2  # the document, and the file's hash


def test_what_cannot_be_read_gives_status_two(made: Path, tmp_path: Path) -> None:
    for name, content in (("nothing", None), ("noise", b"\xff\x00{"), ("later", b'{"format_version": 99}')):
        if content is not None:
            (tmp_path / f"{name}.manifest.json").write_bytes(content)
        done = run_tool("check_data.py", tmp_path / name)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("error: ")
    assert run_tool("check_data.py", made, "--show", 21).returncode == 2


def test_a_document_is_shown_in_both_orders(made: Path) -> None:
    done = run_tool("check_data.py", made, "--show", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"document 0 of {made}, from {made.parent}/a.jsonl, row 1",
        "--- reading order: 8 ids",
        "47 352 946 265 261 260 73 275",
        "Once upon a time",
        "--- as stored: 9 ids",
        "275 73 260 261 265 946 352 47 0",
        f"mei t aon upnceO{END_OF_DOCUMENT}",
    ]
    found = json.loads(run_tool("check_data.py", made, "--show", 1, "--json").stdout)
    assert found["origin"].endswith("a.jsonl, row 3")  # row 2 is empty
    assert found["reading order"]["text"] == english_documents()[0]
