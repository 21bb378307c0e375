"""Several processes in one folder of unfinished work: other plans, no locks, failures of one, kills."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_ledom.data.backends import Encoder
from megatron_ledom.data.encode import SampleChecks
from megatron_ledom.data.manifest import PairRecord
from megatron_ledom.data.merge import merge_shards
from megatron_ledom.data.preprocess import PreprocessConfig, _make_and_join, _task, preprocess
from megatron_ledom.data.shards import WorkFolder
from megatron_ledom.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError, OutputExistsError, TokenizerMismatchError
from megatron_ledom.testing import REPOSITORY, tool_environment, write_jsonl

TOKENIZER = REPOSITORY / "tests" / "assets" / "tokenizer"
TEXTS = [f"text number {i}, not a long one" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", TOKENIZER)


@pytest.fixture
def config(tmp_path: Path) -> PreprocessConfig:
    return PreprocessConfig(
        inputs=[write_jsonl(tmp_path / "a.jsonl", TEXTS)],
        output_prefix=str(tmp_path / "out" / "x"),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(TOKENIZER),
        tokenizer_backend="tokenizers",
        append_eod=True,
        shard_mb=0.001,
    )


def no_report(num_bytes: int) -> None:
    pass


def names(folder: WorkFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir() if path.suffix != ".lock"}


def test_a_worker_of_an_earlier_command_stops_in_a_folder_that_was_begun_anew(
    config: PreprocessConfig, tokenizer: Tokenizer
) -> None:
    old = _task(config, WorkFolder(config.output_prefix), tokenizer)
    other = dataclasses.replace(config, direction=Direction.FORWARD, overwrite=True)

    def begin_anew(num_bytes: int = 0) -> None:
        _task(other, WorkFolder(config.output_prefix), tokenizer)

    assert old(0, no_report).is_made and old.folder.is_finished(0)
    record = old.folder.path / "000000.json"
    text = record.read_text()
    begin_anew()
    with pytest.raises(OutputExistsError, match="was begun anew for another command while this one worked in it"):
        old(1, no_report)
    assert names(old.folder) == {"plan.json"}
    old = _task(dataclasses.replace(config, overwrite=True), WorkFolder(config.output_prefix), tokenizer)
    with pytest.raises(OutputExistsError, match="was begun anew"):  # in the middle of a shard
        old(0, begin_anew)
    assert names(old.folder) == {"plan.json"}
    new = _task(other, WorkFolder(config.output_prefix), tokenizer)
    assert new(0, no_report).is_made and new.folder.is_finished(0)
    without_plan = {name: value for name, value in json.loads(text).items() if name != "plan_sha256"}
    for stray in (text, json.dumps(without_plan)):
        record.write_text(stray)
        assert not new.folder.is_finished(0)
    (manifest,) = preprocess(other, tokenizer)
    assert (manifest.direction, manifest.counts.documents) == (Direction.FORWARD, len(TEXTS))


def test_a_process_that_fails_early_leaves_the_folder_to_the_others(
    config: PreprocessConfig, tokenizer: Tokenizer
) -> None:
    config.inputs[0].write_text("{\n" + config.inputs[0].read_text())
    task = _task(config, WorkFolder(config.output_prefix), tokenizer)
    with task.folder.lock("000002", wait=False), pytest.raises(InputError, match=r"a.jsonl:1: bad JSON"):
        preprocess(config, tokenizer)
    assert task.folder.plan() is not None
    share = dataclasses.replace(config, shard_index=0, num_shards=2)
    with pytest.raises(InputError, match=r"a.jsonl:1: bad JSON"):
        preprocess(share, tokenizer)
    assert task.folder.plan() is not None
    with pytest.raises(InputError, match=r"a.jsonl:1: bad JSON"):
        preprocess(config, tokenizer)  # alone
    assert not task.folder.path.exists()


def test_a_share_whose_folder_vanished_is_not_done(config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    share = dataclasses.replace(config, shard_index=0, num_shards=2)
    task = _task(share, WorkFolder(config.output_prefix), tokenizer)
    shutil.rmtree(task.folder.path)
    with pytest.raises(InputError, match=r"x.shards vanished while this process worked in it"):
        _make_and_join(share, task)

    def vanish(num_bytes: int) -> None:
        shutil.rmtree(task.folder.path)

    task = _task(share, WorkFolder(config.output_prefix), tokenizer)
    with pytest.raises(InputError, match=r"x.shards vanished"):
        task(0, vanish)


def test_another_command_does_not_take_a_published_dataset_for_its_own(
    config: PreprocessConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: WorkFolder) -> None:
        raise KeyboardInterrupt

    other = dataclasses.replace(config, direction=Direction.FORWARD)
    share = dataclasses.replace(other, shard_index=0, num_shards=2, overwrite=True)
    for is_overwritten in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(WorkFolder, "remove", killed)
            preprocess(dataclasses.replace(config, overwrite=is_overwritten), tokenizer)
        with pytest.raises(
            OutputExistsError, match=r"\(direction differ\), killed while it gave .* command again to end"
        ):
            preprocess(other, tokenizer)
        with pytest.raises(OutputExistsError, match=r"remove .*x.shards to start over \(--overwrite does not"):
            preprocess(share, tokenizer)
        if not is_overwritten:
            (manifest,) = preprocess(config, tokenizer)
            assert manifest.direction == Direction.REVERSE
        else:
            (manifest,) = preprocess(dataclasses.replace(other, overwrite=True), tokenizer)
            assert manifest.direction == Direction.FORWARD
        assert not WorkFolder(config.output_prefix).path.exists()


def test_the_manifest_waits_for_the_fingerprint(config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    task = _task(config, WorkFolder(config.output_prefix), tokenizer)
    for shard in range(len(task.shards)):
        task(shard, no_report)
    with pytest.raises(InputError, match=r"all shards in .* are finished, but the process .* was killed"):
        merge_shards(config.output_prefix, workers=1, overwrite=False)
    noted = task.folder.path / "fingerprint"
    noted.touch()  # a power failure
    task.folder.note_fingerprint("sha256:1")
    with pytest.raises(OutputExistsError, match=r"shards of a tokenizer sha256:1, .* process, sha256:2: do all"):
        task.folder.note_fingerprint("sha256:2")
    assert noted.read_text() == "sha256:1"
    with pytest.raises(OutputExistsError, match="do all nodes have one version"):
        preprocess(config, tokenizer)
    noted.unlink()
    (manifest,) = preprocess(config, tokenizer)
    assert manifest.tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("direction", Direction)
def test_a_shard_that_a_killed_run_did_not_compare_is_compared(
    kind: str, direction: Direction, config: PreprocessConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = dataclasses.replace(config, tokenizer_backend="gigatoken", direction=direction)
    if kind == "pairs":
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps({"q": f"What is {i}?", "a": f"It is {i}."}) + "\n" for i in range(60)))
        record = PairRecord("q", "a", "\n", "both")
        config = dataclasses.replace(config, inputs=[path], json_keys=("q", "a"), pairs=record)
    task = _task(config, WorkFolder(config.output_prefix), tokenizer)
    assert len(task.shards) > 2 and task(0, no_report).is_made and task(1, no_report).is_made
    with SampleChecks(task, [0, 1]) as checks:  # right ones
        assert [len(task.finished_sample(shard).ids) > 2 for shard in (0, 1)] == [True, True]  # type: ignore[union-attr]
    assert checks._waiting == deque() and task.folder.is_finished(0)
    right, task.encoder = task.encoder, Wrong(task.encoder)
    for shard in (0, 1):
        task.folder.forget(shard)
    assert task(1, no_report).is_made  # and killed
    task.encoder = right
    assert task(0, no_report).is_made
    with pytest.raises(TokenizerMismatchError, match=r"gigatoken gave wrong ids: token 1 is"):
        preprocess(config, tokenizer)
    assert task.folder.is_finished(0) and not task.folder.is_finished(1)
    (manifest,) = preprocess(config, tokenizer)
    assert manifest.counts.documents == 60


def test_a_first_pair_that_was_left_out_is_not_taken_for_the_first_document(
    config: PreprocessConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path, record = tmp_path / "pairs.jsonl", PairRecord("q", "a", "\n", "both")
    questions = ["What is " + "very " * 40 + "long?", *(f"What is {i}?" for i in range(60))]
    path.write_text("".join(json.dumps({"q": question, "a": "It is."}) + "\n" for question in questions))
    config = dataclasses.replace(
        config, inputs=[path], json_keys=("q", "a"), pairs=record, max_tokens=32, on_bad_record="skip"
    )
    config = dataclasses.replace(config, tokenizer_backend="gigatoken")
    task = _task(config, WorkFolder(config.output_prefix), tokenizer)
    for shard in (0, 1):  # and killed
        assert task(shard, no_report).is_made
    assert task.finished_sample(0) is None and task.finished_sample(1) is not None
    (manifest,) = preprocess(config, tokenizer)
    assert (manifest.counts.documents, manifest.counts.bad_records) == (60, 1)


@pytest.mark.parametrize("damage", ["len", "bin", "crc"])
def test_a_damaged_shard_is_left_to_those_who_join(damage: str, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    task = _task(
        dataclasses.replace(config, tokenizer_backend="gigatoken"), WorkFolder(config.output_prefix), tokenizer
    )
    assert task(0, no_report).is_made and task.finished_sample(0) is not None
    path = task.folder.file(0, 0, damage)
    content = path.read_bytes()
    for wrong in (b"", content[:1], bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(wrong)
        assert task.finished_sample(0) is None
    path.unlink()
    assert task.finished_sample(0) is None


class Wrong:
    """An encoder that gives a wrong id."""

    def __init__(self, right: Encoder) -> None:
        self.name, self._right = right.name, right

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        found = [ids.copy() for ids in self._right.encode_batch(texts)]
        for ids in found:
            ids[1] += 1
        return found


def test_a_run_goes_on_with_the_same_files_of_a_tokenizer_alone(config: PreprocessConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    config = dataclasses.replace(config, tokenizer_model=str(folder), shard_index=0, num_shards=2)
    assert preprocess(config) == []
    same = load_tokenizer("HuggingFaceTokenizer", folder)
    assert [path.name for path in same.files] == ["tokenizer.json", "tokenizer_config.json"]
    content = json.loads(same.files[0].read_text())
    content["added_tokens"][0]["lstrip"] = True
    same.files[0].write_text(json.dumps(content))
    with pytest.raises(OutputExistsError, match=r"unfinished work of another command \(tokenizer differ\)"):
        preprocess(dataclasses.replace(config, shard_index=1))


# A process joins without locks; at one of its changes to the file system another joins, from beginning
# to end.
TWO_JOINERS = """
import dataclasses, errno, fcntl, os, shutil, sys
from pathlib import Path
from megatron_ledom.data.manifest import load_manifest, manifest_path, save_manifest
from megatron_ledom.data.merge import merge_shards
from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.testing import watch_file_system

folder, source, tokenizer = map(Path, sys.argv[1:])
prefix, work, kept = folder / "x", folder / "x.shards", folder.with_name("kept")
dataset = folder / "x_text_document"
preprocess(PreprocessConfig(
    inputs=[source], output_prefix=str(prefix), tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer),
    tokenizer_backend="tokenizers", append_eod=True, shard_mb=0.0015, shard_index=0, num_shards=1,
))

def no_locks(*args):
    raise OSError(errno.ENOSYS, "no locks here")

fcntl.flock = no_locks

def contents():
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and ".manifest" not in p.name}

def in_fork(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def join():
    (manifest,) = merge_shards(str(prefix), workers=1, overwrite=True)
    assert manifest == load_manifest(dataset), "not what stands there"

def join_with_another_at(change):
    count = 0
    def on_change(number):
        nonlocal count
        count = number
        if number == change and in_fork(join) and work.exists():
            os._exit(8)
    watch_file_system(on_change)
    join()
    os._exit(0 if count >= change else 7)

shutil.copytree(work, kept)
join()
right, manifest = contents(), load_manifest(dataset)
old = dataclasses.replace(manifest, created_utc="2020-01-01T00:00:00+00:00")
change = 0
while True:
    for path in folder.iterdir():
        path.unlink()
    shutil.copytree(kept, work)
    save_manifest(old, dataset)
    change += 1
    code = in_fork(lambda: join_with_another_at(change))
    if code == 7:
        break
    assert code == 0, (change, code)
    assert contents() == right, change
    assert sorted(p.name for p in folder.iterdir()) == sorted([*right, manifest_path(dataset).name]), change
    new = load_manifest(dataset)
    assert new.created_utc != old.created_utc and dataclasses.replace(new, created_utc=manifest.created_utc) == manifest
print(change)
"""


def test_without_locks_a_second_joiner_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", TWO_JOINERS, str(tmp_path / "out"), str(source), str(TOKENIZER)]
    environment = {**tool_environment(), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 30  # so many moments
