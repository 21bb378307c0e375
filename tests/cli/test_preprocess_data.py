"""tools/preprocess_data.py as a user runs it: token level truth on 1,000 real documents, and every refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ledom.data.dataset import check_datasets
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.direction import Direction, natural_document, stored_document
from megatron_ledom.testing import REPOSITORY, code_documents, run_tool, tool_environment, write_jsonl

NUM_DOCUMENTS = 1000


def flags(tokenizer_folder: Path, path: Path, prefix: Path, *more: object) -> list[object]:
    return [
        *("--input", path, "--output-prefix", prefix),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder),
        *more,
    ]


@dataclasses.dataclass(frozen=True)
class Made:
    texts: list[str]
    reverse: str
    forward: str
    output: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Made:
    """1,000 source files of the standard library, preprocessed in both directions."""
    folder = tmp_path_factory.mktemp("preprocessed")
    texts = code_documents(NUM_DOCUMENTS)
    path = write_jsonl(folder / "code.jsonl", texts)
    for direction in Direction:
        more = () if direction is Direction.REVERSE else ("--direction", "forward")  # reverse is the default
        prefix = folder / str(direction)
        done = run_tool(
            "preprocess_data.py", *flags(tokenizer_folder, path, prefix, "--append-eod", "--workers", 2, *more)
        )
        assert done.returncode == 0, done.stderr
    return Made(texts, f"{folder}/reverse_text_document", f"{folder}/forward_text_document", done.stdout)


def test_megatrons_reader_returns_ids_that_decode_to_the_very_text(made: Made, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    dataset = IndexedDataset(made.reverse)
    assert len(dataset) == NUM_DOCUMENTS
    assert dataset.document_indices.tolist() == list(range(NUM_DOCUMENTS + 1))
    for i, text in enumerate(made.texts):
        assert tokenizer.decode(natural_document(dataset[i], Direction.REVERSE, tokenizer.eod_id)) == text


def test_reverse_ids_are_the_tokenizers_own_flipped_and_closed(made: Made, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    forward, reverse = IndexedDataset(made.forward), IndexedDataset(made.reverse)
    for i in range(NUM_DOCUMENTS):
        natural = natural_document(forward[i], Direction.FORWARD, tokenizer.eod_id)
        assert np.array_equal(reverse[i], stored_document(natural, Direction.REVERSE, tokenizer.eod_id))
        if i % 10 == 0:
            assert np.array_equal(natural, tokenizer.encode(made.texts[i]))


def test_both_files_pass_the_guard_of_their_direction(made: Made, tokenizer_folder: Path) -> None:
    fingerprint = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint
    for direction, prefix in ((Direction.REVERSE, made.reverse), (Direction.FORWARD, made.forward)):
        (dataset,) = check_datasets([prefix], direction=direction, tokenizer_fingerprint=fingerprint)
        manifest = dataset.manifest
        assert manifest is not None and not dataset.is_turned
        assert manifest.counts.documents == NUM_DOCUMENTS
        assert manifest.counts.text_bytes == sum(len(t.encode()) for t in made.texts)


def test_the_summary_says_what_was_made(made: Made) -> None:
    assert f"{made.reverse}.bin .idx .manifest.json" in made.output
    for words in ("1,000 documents", "tokens of uint16, reverse, closed by id 0", "tokens/s", "bytes a token"):
        assert words in made.output


def test_gzip_and_several_files_and_keys(tokenizer_folder: Path, tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.jsonl").write_text('{"q": "one", "a": "1"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"q": "two", "a": "2"}\n'))
    more = (tmp_path / "b.jsonl.gz", "--json-keys", "q", "a")
    prefix = tmp_path / "new" / "qa"
    arguments = flags(tokenizer_folder, tmp_path / "a.jsonl", prefix)
    done = run_tool("preprocess_data.py", *arguments[:2], *more, *arguments[2:])
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    dataset = IndexedDataset(f"{prefix}_q_document")
    assert [tokenizer.decode(natural_document(dataset[i], Direction.REVERSE, None)) for i in (0, 1)] == ["one", "two"]
    assert Path(f"{prefix}_a_document.manifest.json").is_file()


def test_every_refusal_is_one_line_with_status_two(tokenizer_folder: Path, corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": "cut off\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "taken_text_document.bin").touch()
    out = tmp_path / "out"
    for arguments, message in [
        (
            flags(tokenizer_folder, tmp_path / "nowhere.jsonl", out),
            f"input file {tmp_path}/nowhere.jsonl: No such file",
        ),
        (flags(tokenizer_folder, bad, out), f"{bad}:2: bad JSON at column"),
        (flags(tokenizer_folder, corpus, out, "--json-keys", "body"), ":1: no key 'body' (keys found: 'text')"),
        (flags(tokenizer_folder, tmp_path / "empty.jsonl", out), "the corpus is empty"),
        (flags(tokenizer_folder, corpus, tmp_path / "taken"), "taken_text_document.bin exists; choose another"),
        (flags(tmp_path / "no_tokenizer", corpus, out), "no_tokenizer is not a folder"),
        (flags(tokenizer_folder, corpus, out, "--tokenizer-type", "TikTokenizer"), "TikTokenizer is not supported"),
    ]:
        done = run_tool("preprocess_data.py", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "empty.jsonl", "taken_text_document.bin"]


def test_help_names_megatrons_flags() -> None:
    done = run_tool("preprocess_data.py", "--help")
    assert done.returncode == 0
    for flag in ("--input", "--json-keys", "--tokenizer-type", "--tokenizer-model", "--output-prefix", "--append-eod"):
        assert flag in done.stdout
    assert run_tool("preprocess_data.py", "--direction", "sideways").returncode == 2


def peak_rss_mb(arguments: list[object]) -> float:
    """The largest sum of the resident sets of the tool's process tree."""
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), *map(str, arguments)]
    process = subprocess.Popen(command, env=tool_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for each in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
        peak = max(peak, total)
        time.sleep(0.01)
    assert process.returncode == 0
    return peak / 2**20


def test_memory_does_not_grow_with_the_number_of_documents(tokenizer_folder: Path, tmp_path: Path) -> None:
    words = " ".join(code_documents(40)).split()
    texts = [" ".join(words[i : i + 6]) for i in range(0, 60_000, 6)]
    peaks = []
    for times in (30, 90):  # 3 * 10^5 and 9 * 10^5 documents: both fill the workers' buffers
        path = write_jsonl(tmp_path / f"{times}.jsonl", texts * times)
        arguments = flags(tokenizer_folder, path, tmp_path / f"out{times}", "--workers", 2)
        peaks.append(peak_rss_mb(arguments))
    assert peaks[1] < 1.1 * peaks[0], peaks  # 6 * 10^5 documents as Python ints and strings would be 50 MB and more
    assert peaks[1] < 500, peaks
