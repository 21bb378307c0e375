"""Manifests, and the guard that compares them with a run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.data.dataset import check_datasets
from megatron_ledom.data.manifest import load_manifest, manifest_path, save_manifest
from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DirectionError, InputError, TokenizerMismatchError
from megatron_ledom.testing import english_documents, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder with the same ten documents as `reverse_text_document`, `forward_...` and, without EOD, `open_...`."""
    folder = tmp_path_factory.mktemp("datasets")
    path = write_jsonl(folder / "a.jsonl", english_documents()[:10])
    for name, direction, append_eod in (
        ("reverse", "reverse", True),
        ("forward", "forward", True),
        ("open", "reverse", False),
    ):
        preprocess(
            PreprocessConfig(
                inputs=[path],
                output_prefix=str(folder / name),
                tokenizer_type="HuggingFaceTokenizer",
                tokenizer_model=str(tokenizer_folder),
                direction=Direction(direction),
                append_eod=append_eod,
            )
        )
    return folder


@pytest.fixture
def datasets(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "datasets"))


def edit(prefix: Path, **fields: Any) -> None:
    path = manifest_path(prefix)
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}), encoding="utf-8")


def check(*prefixes: Path, direction: Direction = Direction.REVERSE, fingerprint: str | None = None) -> Any:
    return check_datasets(prefixes, direction=direction, tokenizer_fingerprint=fingerprint)


def test_whole_datasets_of_the_right_direction_and_tokenizer_pass(datasets: Path, tokenizer_folder: Path) -> None:
    fingerprint = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint
    (found,) = check(datasets / "reverse_text_document", fingerprint=fingerprint)
    manifest = found.manifest
    assert manifest is not None and manifest.direction is found.direction is Direction.REVERSE
    assert (found.num_documents, found.num_tokens, found.is_closed) == (10, manifest.counts.tokens, True)
    assert (found.bin_bytes, found.bin_sha256) == (manifest.files["bin"].bytes, manifest.files["bin"].sha256)
    assert (manifest.tokenizer.fingerprint, manifest.eod_id, manifest.counts.documents) == (fingerprint, 0, 10)
    assert check(datasets / "forward_text_document", direction=Direction.FORWARD)[0].direction is Direction.FORWARD
    assert check() == []


def test_another_tokenizer_is_refused_with_both_fingerprints(datasets: Path) -> None:
    made_with = load_manifest(datasets / "reverse_text_document").tokenizer.fingerprint
    with pytest.raises(TokenizerMismatchError, match=f"{made_with}.*another one .sha256:0"):
        check(datasets / "reverse_text_document", fingerprint="sha256:0")


def test_missing_files_are_named_and_the_likely_name_is_offered(datasets: Path) -> None:
    with pytest.raises(InputError, match=r"no .*nowhere.bin and no .*nowhere.idx$"):
        check(datasets / "nowhere")
    with pytest.raises(InputError, match=r"did you mean .*reverse_text_document\?"):
        check(datasets / "reverse")
    with pytest.raises(InputError, match=r"did you mean .*reverse_text_document\?"):
        check(datasets / "reverse_text_document.bin")
    (datasets / "reverse_text_document.bin").unlink()
    with pytest.raises(InputError, match=r"no .*reverse_text_document.bin$"):
        check(datasets / "reverse_text_document")
    manifest_path(datasets / "forward_text_document").unlink()
    with pytest.raises(InputError, match=r"manifest.json does not exist.*tools/preprocess_data.py"):
        check(datasets / "forward_text_document", direction=Direction.FORWARD)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_truncated_file_is_refused_with_both_sizes(datasets: Path, suffix: str) -> None:
    path = datasets / f"reverse_text_document.{suffix}"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(InputError, match=f"{suffix} has {size - 1:,} bytes, its manifest says {size:,}"):
        check(datasets / "reverse_text_document")


def test_an_index_of_equal_size_that_belongs_elsewhere_is_refused(datasets: Path) -> None:
    path = datasets / "reverse_text_document.idx"
    content = bytearray(path.read_bytes())
    content[17] = 4  # int32 instead of uint16
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"\('int32', 10, 11\), the manifest says \('uint16', 10, 11\)"):
        check(datasets / "reverse_text_document")


def test_a_dataset_without_end_of_document_ids_is_warned_of(
    datasets: Path, log_of: Callable[[str], pytest.LogCaptureFixture]
) -> None:
    log = log_of("megatron_ledom.data.dataset")
    (found,) = check(datasets / "open_text_document")
    assert not found.is_closed
    assert "without --append-eod" in log.text


def test_a_manifest_comes_back_as_it_was_saved_and_unknown_fields_are_left_alone(datasets: Path) -> None:
    prefix = datasets / "reverse_text_document"
    manifest = load_manifest(prefix)
    edit(prefix, note="from a later version that adds a field")
    assert load_manifest(prefix) == manifest
    changed = dataclasses.replace(manifest, append_eod=False)
    assert save_manifest(changed, prefix) == manifest_path(prefix)
    assert load_manifest(prefix) == changed


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"format_version": 4}, InputError, "has format 4, this version reads up to 3"),
        ({"format_version": "removed"}, InputError, "no format_version"),
        ({"direction": "sideways"}, DirectionError, "field 'direction' says direction 'sideways'"),
        ({"direction": "removed"}, InputError, "lacks direction"),
        ({"tokenizer": {"type": "x"}}, InputError, "lacks tokenizer.model, tokenizer.fingerprint"),
        ({"append_eod": 1}, InputError, "field append_eod is 1, which is of the wrong type"),
        ({"files": {"bin": {"bytes": "7", "sha256": ""}}}, InputError, "field files.bin.bytes is '7'"),
        ({"files": {}}, InputError, "files \\[\\] found"),
        ({"sources": {}}, InputError, "field sources is {}"),
        ({"reverse_unit": "word"}, InputError, "reverse_unit 'word'"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(
    datasets: Path, fields: dict[str, Any], kind: type[Exception], message: str
) -> None:
    edit(datasets / "reverse_text_document", **fields)
    with pytest.raises(kind, match=message):
        check(datasets / "reverse_text_document")


def test_a_manifest_that_is_not_json_is_refused(datasets: Path) -> None:
    for content in (b"{", b"[]", b"\xff"):
        manifest_path(datasets / "reverse_text_document").write_bytes(content)
        with pytest.raises(InputError, match=r"manifest.json"):
            check(datasets / "reverse_text_document")
