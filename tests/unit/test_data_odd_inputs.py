"""Inputs that are seldom seen: links between folders, names that are not UTF-8, huge numbers, parquet without rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ledom.data.manifest import has_right_hash, load_manifest
from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.data.records import BadRecord, parse_line
from megatron_ledom.data.sources import find_sources
from megatron_ledom.errors import InputError
from megatron_ledom.testing import REPOSITORY, write_jsonl

TOKENIZER = REPOSITORY / "tests" / "assets" / "tokenizer"


def config(tmp_path: Path, *inputs: Path, **more: object) -> PreprocessConfig:
    fixed = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(TOKENIZER), "append_eod": True}
    return PreprocessConfig(inputs=inputs, output_prefix=str(tmp_path / "out" / "x"), **fixed, **more)


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    for name in ("in/b/1.jsonl", "in/c/d/2.jsonl", "in/.hidden/3.jsonl", "far/4.jsonl", "far/deep/5.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, ["a"])
    root = tmp_path / "in"
    for link, target in (
        ("in/a", "../far"),  # sorted before what is there itself
        ("in/again", "c"),  # there already, under its own name
        ("in/seen", ".hidden"),
        ("far/back", "../in"),  # loops
        ("far/deep/self", "."),
    ):
        (tmp_path / link).symlink_to(target)
    right = ["a/4.jsonl", "a/deep/5.jsonl", "b/1.jsonl", "c/d/2.jsonl"]
    for pattern, expected in (
        ("", [*right, "seen/3.jsonl"]),
        ("**/*.jsonl", [".hidden/3.jsonl", *right]),
        ("**/**/*.jsonl", [".hidden/3.jsonl", *right]),
        ("*/**/*.jsonl", [".hidden/3.jsonl", *right[:2], "again/d/2.jsonl", *right[2:], "seen/3.jsonl"]),
        ("c/**/d/*", ["c/d/2.jsonl"]),
    ):
        assert [str(s.path.relative_to(root)) for s in find_sources([root / pattern])] == expected


def test_an_input_whose_name_is_not_utf8_is_published(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"na\xefve.jsonl")
    write_jsonl(path, ["one", "two"])
    (manifest,) = preprocess(config(tmp_path, path))
    assert manifest.sources[0].path == str(path.resolve())
    prefix = tmp_path / "out" / "x_text_document"
    assert load_manifest(prefix) == manifest and has_right_hash(prefix)


@pytest.mark.parametrize("keys", [("text",), ("text", "title")])
def test_an_integer_that_is_too_long_to_read_is_a_bad_record(tmp_path: Path, keys: tuple[str, ...]) -> None:
    line = '{"text": "a", "title": "b", "n": ' + "1" * 5000 + "}"
    with pytest.raises(BadRecord, match="JSON that cannot be read: Exceeds the limit"):
        parse_line(line.encode(), keys)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "title": "b"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"a.jsonl:2: JSON that cannot be read"):
        preprocess(config(tmp_path, path, json_keys=keys))
    manifests = preprocess(config(tmp_path, path, json_keys=keys, on_bad_record="skip"))
    assert [(m.counts.documents, m.counts.bad_records, m.tokenizer.backend) for m in manifests] == [
        (1, 1, "gigatoken")
    ] * len(keys)


def test_parquet_files_without_a_row_are_an_empty_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    schema = pa.schema([("text", pa.string())])
    pq.ParquetWriter(path, schema).close()
    assert pq.ParquetFile(path).metadata.num_row_groups == 0
    with pytest.raises(InputError, match=r"the corpus is empty: .*a.parquet hold parquet files without a row"):
        preprocess(config(tmp_path, path))
    assert not (tmp_path / "out").exists()
