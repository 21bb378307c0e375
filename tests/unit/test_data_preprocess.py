"""The pipeline: same bytes for any number of workers, what is counted, and what is left after a failure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ledom.data.encode import SampleChecks
from megatron_ledom.data.manifest import load_manifest
from megatron_ledom.data.preprocess import PreprocessConfig, _task, preprocess
from megatron_ledom.data.shards import WorkFolder
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.direction import Direction, flip
from megatron_ledom.errors import InputError, OutputError, OutputExistsError, TokenizerMismatchError, UsageError
from megatron_ledom.testing import END_OF_DOCUMENT, code_documents, english_documents, write_jsonl

SUFFIXES = (".bin", ".crc32", ".idx", ".manifest.json", ".skipped.jsonl")


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> PreprocessConfig:
    return PreprocessConfig(
        inputs=[corpus],
        output_prefix=str(tmp_path / "out" / "a"),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer_folder),
        append_eod=True,
    )


def outputs(config: PreprocessConfig) -> dict[str, bytes]:
    folder = Path(config.output_prefix).parent
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())} if folder.exists() else {}


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.endswith(".manifest.json")}


def test_workers_and_shards_do_not_change_the_bytes(config: PreprocessConfig, tmp_path: Path) -> None:
    texts = code_documents(120)
    inputs = [write_jsonl(tmp_path / "a.jsonl", texts[:70]), write_jsonl(tmp_path / "b.jsonl", texts[70:])]
    config = dataclasses.replace(config, inputs=inputs)
    (one,) = preprocess(config)
    alone = outputs(config)
    assert list(alone) == [f"a_text_document{s}" for s in SUFFIXES]
    for workers, shard_mb in ((2, None), (5, 0.1), (2, 0.03), (1, 0.001)):
        changes = dataclasses.replace(config, workers=workers, shard_mb=shard_mb, overwrite=True)
        (other,) = preprocess(changes)
        assert without_manifest(outputs(config)) == without_manifest(alone), (workers, shard_mb)
        assert dataclasses.replace(other, created_utc=one.created_utc) == one
    assert [(Path(s.path).name, s.documents) for s in one.sources] == [("a.jsonl", 70), ("b.jsonl", 50)]


def test_the_manifest_states_what_the_files_hold(config: PreprocessConfig) -> None:
    (manifest,) = preprocess(config)
    files = outputs(config)
    for suffix, file in (manifest.files | manifest.sidecars).items():
        content = files[f"a_text_document.{suffix}"]
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    dataset = IndexedDataset(config.prefixes[0])
    texts = english_documents()
    assert manifest.counts.documents == len(dataset) == len(texts)
    assert manifest.counts.tokens == int(dataset.sequence_lengths.sum())
    assert manifest.counts.text_bytes == sum(len(t.encode()) for t in texts)
    assert manifest == load_manifest(config.prefixes[0])


def test_without_end_of_document_ids_and_forward(config: PreprocessConfig, tokenizer_folder: Path) -> None:
    preprocess(dataclasses.replace(config, append_eod=False, direction=Direction.FORWARD))
    preprocess(dataclasses.replace(config, append_eod=False, output_prefix=config.output_prefix + "r"))
    forward, reverse = IndexedDataset(config.prefixes[0]), IndexedDataset(f"{config.output_prefix}r_text_document")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    for i, text in enumerate(english_documents()[:20]):
        assert np.array_equal(forward[i], tokenizer.encode(text))
        assert np.array_equal(reverse[i], flip(tokenizer.encode(text)))


def test_empty_documents_are_left_out_and_counted_and_ends_inside_texts_too(
    config: PreprocessConfig, tmp_path: Path, log_of: Callable[[str], pytest.LogCaptureFixture]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", "one", "", f"two{END_OF_DOCUMENT}three{END_OF_DOCUMENT}"])
    log = log_of("megatron_ledom.data.preprocess")
    (manifest,) = preprocess(dataclasses.replace(config, inputs=[path]))
    counts = manifest.counts
    assert (counts.documents, counts.empty_documents, counts.eod_in_text) == (2, 2, 2)
    assert manifest.sources[0].documents == 2
    assert "holds the end-of-document token 2 times" in log.text


def test_every_key_becomes_a_dataset(config: PreprocessConfig, tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"q": "why", "a": "because"}\n{"q": "when", "a": ""}\n', encoding="utf-8")
    question, answer = preprocess(dataclasses.replace(config, inputs=[path], json_keys=("q", "a")))
    assert (question.json_key, question.counts.documents) == ("q", 2)
    assert (answer.json_key, answer.counts.documents, answer.counts.empty_documents) == ("a", 1, 1)
    assert list(outputs(config)) == sorted(f"a_{key}_document{s}" for key in "qa" for s in SUFFIXES)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_leaves_nothing(config: PreprocessConfig, tmp_path: Path, workers: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", code_documents(60))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": 7}\n')
    with pytest.raises(InputError, match=r"a.jsonl:61: the value of 'text' must be a string"):
        preprocess(dataclasses.replace(config, inputs=[path], workers=workers))
    assert outputs(config) == {}


def test_a_failed_run_leaves_the_former_output_alone(config: PreprocessConfig, tmp_path: Path) -> None:
    preprocess(config)
    before = outputs(config)
    with pytest.raises(OutputExistsError, match=r"a_text_document.bin exists; .*--overwrite"):
        preprocess(config)
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad.jsonl:1: bad JSON"):
        preprocess(dataclasses.replace(config, inputs=[tmp_path / "bad.jsonl"], overwrite=True))
    assert outputs(config) == before


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_text_is_refused(config: PreprocessConfig, tmp_path: Path, texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text() + "\n \n")
    with pytest.raises(InputError, match="corpus is empty: no text under the key 'text'"):
        preprocess(dataclasses.replace(config, inputs=[path]))
    assert outputs(config) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "--workers must be at least 1"),
        ({"json_keys": ("a", "a")}, "--json-keys must name different keys"),
        ({"output_prefix": "out/"}, "is a folder; add the beginning of a file name"),
    ],
)
def test_flags_that_cannot_work_are_refused(config: PreprocessConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preprocess(dataclasses.replace(config, **changes))


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Make the operating system refuse bytes beyond the limit in any file, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_is_full_is_told_and_the_same_command_goes_on_when_there_is_room(
    config: PreprocessConfig, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"] * 1000)
    config = dataclasses.replace(config, inputs=[path], shard_mb=0.002)
    preprocess(config)
    whole = outputs(config)
    sizes = {name: len(content) for name, content in whole.items()}
    assert sizes["a_text_document.idx"] > sizes["a_text_document.bin"] == 4000
    for limit, refused, is_kept in ((100, "a.shards", False), (3950, "a_text_document.bin", True)):
        shutil.rmtree(Path(config.output_prefix).parent)
        with file_size_limit(limit), pytest.raises(OutputError, match=rf"cannot write .*{refused}.* Make room|choose"):
            preprocess(config)
        left = {p.name for p in Path(config.output_prefix).parent.iterdir()}
        assert left == ({"a.shards"} if is_kept else set())
    preprocess(config)
    assert without_manifest(outputs(config)) == without_manifest(whole)


def test_a_full_disk_in_the_middle_of_a_shard_leaves_nothing(config: PreprocessConfig) -> None:
    with file_size_limit(50_000), pytest.raises(OutputError, match=r"cannot write .*a.shards .*Make room"):
        preprocess(config)
    assert list(Path(config.output_prefix).parent.iterdir()) == []


def test_a_worker_that_is_killed_is_reported_and_the_same_command_goes_on(
    config: PreprocessConfig, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", code_documents(300))
    config = dataclasses.replace(config, inputs=[path], workers=2, shard_mb=0.5)

    def kill_first_worker() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        assert workers[0].pid is not None
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_first_worker)
    killer.start()
    with pytest.raises(InputError, match=r"a worker process died while .*same command goes on"):
        preprocess(config)
    killer.join()
    assert multiprocessing.active_children() == []
    assert {p.name for p in Path(config.output_prefix).parent.iterdir()} <= {"a.shards"}
    (manifest,) = preprocess(config)
    assert manifest.counts.documents == 300


def test_bytes_are_those_of_megatrons_tool_for_the_same_text(config: PreprocessConfig, tmp_path: Path) -> None:
    """Forward, Megatron's loop over its own tokenizer and builder gives the same two files."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    preprocess(dataclasses.replace(config, direction=Direction.FORWARD))
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_model)
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(len(tokenizer)))
    for line in config.inputs[0].read_text(encoding="utf-8").splitlines():
        ids = [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        ours = Path(f"{config.prefixes[0]}.{suffix}").read_bytes()
        assert ours == (tmp_path / f"m.{suffix}").read_bytes()


def test_a_document_of_every_shard_is_compared_with_the_tokenizers_own_ids(
    config: PreprocessConfig, tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    task = _task(config, WorkFolder(config.output_prefix), tokenizer)
    outcome = task(0, lambda num_bytes: None)
    assert task.encoder.name == "gigatoken" and outcome.sample is not None and task.folder.is_finished(0)
    checks = SampleChecks(task)
    checks.add(0, outcome.sample)
    assert task.folder.is_finished(0)
    wrong = outcome.sample.ids.copy()
    wrong[2] += 1
    with pytest.raises(TokenizerMismatchError, match=r"gigatoken gave wrong ids: token 2 is .*, tokenizers gives"):
        checks.add(0, outcome.sample._replace(ids=wrong))
    assert not task.folder.is_finished(0)


def test_what_was_not_compared_in_time_is_compared_in_the_end(config: PreprocessConfig, tokenizer_folder: Path) -> None:
    class Busy:
        """An answer that is there only for those who wait."""

        def __init__(self, ids: np.ndarray) -> None:
            self.ids = ids

        def __call__(self) -> np.ndarray:
            return self.ids

        def is_there(self) -> bool:
            return False

    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    tokenizer.ask_ahead = lambda name, text: Busy(tokenizer.encode(text))  # type: ignore[method-assign]
    task = dataclasses.replace(
        _task(config, WorkFolder(config.output_prefix), load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)),
        tokenizer=tokenizer,
    )
    sample = task(0, lambda num_bytes: None).sample
    assert sample is not None
    wrong = sample._replace(ids=sample.ids[:-1])
    for error in (None, InputError("something else")):
        assert task(0, lambda num_bytes: None).is_made == (error is not None)  # forgotten in the first round
        with pytest.raises(TokenizerMismatchError), SampleChecks(task) as checks:
            checks.add(0, sample)
            checks.add(0, wrong)
            assert task.folder.is_finished(0)
            if error is not None:
                raise error
        assert not task.folder.is_finished(0)
    with pytest.raises(KeyboardInterrupt), SampleChecks(task) as checks:
        checks.add(0, wrong)
        raise KeyboardInterrupt
