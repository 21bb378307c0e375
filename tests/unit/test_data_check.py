"""check_data finds every change: each byte of the small files, a thousand of the ids, and every cut."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_ledom.data.check import MAX_FAULTS, check_dataset
from megatron_ledom.data.documents import origin_of, read_document
from megatron_ledom.data.files import WrittenFile
from megatron_ledom.data.manifest import load_manifest, manifest_path, save_manifest
from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.errors import InputError, LedomError
from megatron_ledom.files import hash_file
from megatron_ledom.testing import english_documents, write_jsonl

TEXTS = ["One sentence. And a second one!\n", "", "naïve 🙂", *(t[:200] for t in english_documents()[:9]), "", "end"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A small dataset of two sources with blank, empty and bad rows; its files are `x_text_document.*`."""
    folder = tmp_path_factory.mktemp("made")
    first = write_jsonl(folder / "a.jsonl", TEXTS[:5])
    with first.open("a", encoding="utf-8") as file:
        file.write("\n{bad\n")
    config = PreprocessConfig(
        inputs=[first, write_jsonl(folder / "b.jsonl", TEXTS[5:])],
        output_prefix=str(folder / "x"),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer_folder),
        append_eod=True,
        on_bad_record="skip",
    )
    preprocess(config)
    return folder


@pytest.fixture
def prefix(made: Path, tmp_path: Path) -> str:
    return f"{shutil.copytree(made, tmp_path / 'copy')}/x_text_document"


def faults(prefix: str) -> list[str]:
    """What is found; a refusal to go on counts as found."""
    try:
        return check_dataset(prefix).faults
    except LedomError as error:
        return [str(error)]


def changed(path: Path, places: Iterator[int] | range, seed: int) -> Iterator[int]:
    """Change one byte at a time, each to another value of chance, and put it back."""
    rng = random.Random(seed)
    whole = path.read_bytes()
    for place in places:
        content = bytearray(whole)
        content[place] ^= rng.randint(1, 255)
        path.write_bytes(content)
        yield place
    path.write_bytes(whole)


def test_a_sound_dataset_has_no_fault(prefix: str, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    read = []
    report = check_dataset(prefix, tokenizer, read.append)
    manifest = load_manifest(prefix)
    assert report.faults == []
    assert (report.documents, report.tokens) == (manifest.counts.documents, manifest.counts.tokens)
    assert (
        sum(read) == sum(f.bytes for f in (manifest.files | manifest.sidecars).values()) + manifest.files["bin"].bytes
    )


@pytest.mark.parametrize("suffix", ["idx", "crc32", "skipped.jsonl"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_changed_byte_of_a_small_file_is_found(prefix: str, suffix: str, seed: int) -> None:
    path = Path(f"{prefix}.{suffix}")
    for place in changed(path, range(path.stat().st_size), seed):
        assert any(suffix in fault for fault in faults(prefix)), place
    assert faults(prefix) == []


@pytest.mark.parametrize("seed", [1, 2])
def test_every_changed_byte_of_a_manifest_is_found_or_changes_nothing(prefix: str, seed: int) -> None:
    path, right = manifest_path(prefix), load_manifest(prefix)
    harmless = 0
    for place in changed(path, range(path.stat().st_size), seed):
        if not faults(prefix):
            assert load_manifest(prefix) == right, place  # white space between fields
            harmless += 1
    assert harmless < 40
    assert faults(prefix) == []


def test_a_thousand_changed_bytes_of_the_ids_are_found_with_document_source_and_row(prefix: str) -> None:
    path, manifest = Path(f"{prefix}.bin"), load_manifest(prefix)
    ends = 2 * np.cumsum(np.fromfile(f"{prefix}.idx", "<i4", manifest.counts.documents, offset=34))
    rng = random.Random(3)
    for place in changed(path, (rng.randrange(path.stat().st_size) for _ in range(1000)), seed=3):
        document = int(np.searchsorted(ends, place, side="right"))
        source, row = origin_of(prefix, manifest, document)
        where = f"document {document} ({manifest.sources[source].path}, row {row}) does not fit its CRC-32"
        found = faults(prefix)
        assert any(where in fault for fault in found), (place, found)
        assert sum("does not fit its CRC-32" in fault for fault in found) == 1
    assert faults(prefix) == []


def test_a_damaged_id_is_found_even_where_hashes_were_made_to_fit(prefix: str) -> None:
    """Whoever rewrites the manifest cannot hide ids outside the vocabulary, or a missing end of document."""
    path = Path(f"{prefix}.bin")
    content = np.fromfile(path, "<u2")
    for place, value, message in ((0, 2000, "document 0 holds id 2000"), (len(content) - 1, 5, "ends with id 5")):
        edited = content.copy()
        edited[place] = value
        edited.tofile(path)
        manifest = load_manifest(prefix)
        manifest.files["bin"] = WrittenFile(path.stat().st_size, hash_file(path))
        save_manifest(manifest, prefix)
        assert any(message in fault for fault in faults(prefix))


@pytest.mark.parametrize("suffix", ["bin", "idx", "crc32", "skipped.jsonl", "manifest.json"])
def test_every_cut_and_every_missing_file_is_found(prefix: str, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 7), len(whole) - 1, len(whole) + 1}:
        path.write_bytes(whole[:size] if size < len(whole) else whole + b"\n")
        if not (suffix == "manifest.json" and size >= len(whole) - 1):  # the last newline of JSON says nothing
            assert faults(prefix), size
    path.unlink()
    assert any(f"x_text_document.{suffix}" in fault for fault in faults(prefix))


def test_files_full_of_noise_are_faults_and_nothing_else(prefix: str) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("bin", "idx", "crc32", "skipped.jsonl", "manifest.json"):
        path = Path(f"{prefix}.{suffix}")
        whole = path.read_bytes()
        for keep in (0, 9, 17, 34, 100):
            noise = rng.integers(0, 256, size=max(0, len(whole) - keep), dtype=np.uint8).tobytes()
            path.write_bytes(whole[:keep] + noise)
            assert faults(prefix) or whole[:keep] + noise == whole
        path.write_bytes(whole)


def test_many_faults_are_counted_and_a_few_are_listed(prefix: str) -> None:
    Path(f"{prefix}.crc32").write_bytes(bytes(Path(f"{prefix}.crc32").stat().st_size))
    found = [f for f in faults(prefix) if "CRC-32" in f]
    assert len(found) == min(MAX_FAULTS, load_manifest(prefix).counts.documents)


def test_another_tokenizer_is_told(prefix: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "other"))
    config = folder / "tokenizer.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r'"add_prefix_space": *false', '"add_prefix_space": true', text), encoding="utf-8")
    found = check_dataset(prefix, load_tokenizer("HuggingFaceTokenizer", folder)).faults
    assert len(found) == 1
    assert "was made with HuggingFaceTokenizer" in found[0]


def test_documents_come_back_with_their_source_and_row(prefix: str, tokenizer_folder: Path) -> None:
    tokenizer, manifest = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder), load_manifest(prefix)
    rows = [(0, i + 1) for i, t in enumerate(TEXTS[:5]) if t] + [(1, i + 1) for i, t in enumerate(TEXTS[5:]) if t]
    for number, ((source, row), text) in enumerate(zip(rows, filter(None, TEXTS), strict=True)):
        document = read_document(prefix, manifest, number)
        assert tokenizer.decode(document.natural) == text
        assert document.origin == f"{manifest.sources[source].path}, row {row}"
        assert document.stored[:-1].tolist() == document.natural.tolist()[::-1]
    for number in (-1, len(rows)):
        with pytest.raises(InputError, match=f"there is no document {number}"):
            read_document(prefix, manifest, number)


def test_a_dataset_of_format_one_is_checked_as_far_as_it_tells(made: Path, tmp_path: Path) -> None:
    """The manifest of the first version: no hash of itself, no files beside it."""
    prefix = f"{shutil.copytree(made, tmp_path / 'copy')}/x_text_document"
    import json

    fields = json.loads(manifest_path(prefix).read_text(encoding="utf-8"))
    for name in ("manifest_sha256", "sidecars"):
        del fields[name]
    for name, part in (
        ("rows", fields["sources"][0]),
        ("format", fields["sources"][0]),
        ("backend", fields["tokenizer"]),
    ):
        del part[name]
    del fields["counts"]["bad_records"]
    fields["format_version"] = 1
    manifest_path(prefix).write_text(json.dumps(fields), encoding="utf-8")
    assert faults(prefix) == []
    assert read_document(prefix, load_manifest(prefix), 0).origin.endswith("a.jsonl, row 1")
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[3] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    assert any("is not the file that was written" in fault for fault in faults(prefix))
