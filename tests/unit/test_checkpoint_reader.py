"""The reader against torch's own loader on real checkpoints, and every way in which a checkpoint can be refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_cases import ITERATION
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.locate import finished_steps
from megatron_ledom.checkpoint.reader import COMMON_STATE
from megatron_ledom.direction import Direction
from megatron_ledom.errors import CheckpointError, DirectionError


@pytest.fixture
def save(cases: Path, tmp_path: Path) -> Path:
    """A `--save` folder of one's own to damage."""
    return Path(shutil.copytree(cases / "gqa_padded", tmp_path / "save"))


def step_folder(save: Path) -> Path:
    return save / f"iter_{ITERATION:07d}"


def check_against_torch(checkpoint: Checkpoint) -> int:
    """Compare every tensor and its first and last slice with torch's loader; return their number."""
    names = checkpoint.tensor_names()
    loaded: dict[str, Any] = {n: torch.empty(checkpoint.shape(n), dtype=checkpoint.dtype(n)) for n in names}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(checkpoint.folder), no_dist=True)
    for name in names:
        assert torch.equal(checkpoint.read(name), loaded[name]), name
        for index in {0, len(loaded[name]) - 1}:
            assert torch.equal(checkpoint.read_slice(name, index), loaded[name][index]), name
    return len(names)


@pytest.mark.distributed
def test_tensors_of_tp2_pp2_are_those_that_torch_loads(run: Path) -> None:
    checkpoint = Checkpoint.open(run / "checkpoints")
    assert check_against_torch(checkpoint) > 30  # optimizer state included
    assert checkpoint.shape("decoder.layers.mlp.linear_fc1.weight") == (4, 256, 64)
    assert len(checkpoint.tensors["decoder.layers.mlp.linear_fc1.weight"].chunks) == 16  # 4 layers x 2 ranks x 2 halves
    assert (checkpoint.iteration, checkpoint.direction) == (4, Direction.REVERSE)
    assert checkpoint.args.tensor_model_parallel_size == 2
    assert checkpoint.args.tokenizer_fingerprint.startswith("sha256:")


@pytest.mark.distributed
def test_a_step_can_be_chosen(run: Path) -> None:
    assert finished_steps(run / "checkpoints") == [2, 4]
    assert Checkpoint.open(run / "checkpoints", step=2).iteration == 2
    assert Checkpoint.open(run / "checkpoints" / "iter_0000002").iteration == 2
    with pytest.raises(CheckpointError, match="no step 3; finished steps: 2, 4"):
        Checkpoint.open(run / "checkpoints", step=3)
    with pytest.raises(CheckpointError, match="leave the step out"):
        Checkpoint.open(run / "checkpoints" / "iter_0000002", step=4)
    with pytest.raises(CheckpointError, match=r"run directory; its checkpoints are in .*checkpoints"):
        Checkpoint.open(run)


@pytest.mark.parametrize("name", ["gqa_padded", "bfloat16", "one_key_a_layer"])
def test_tensors_of_one_rank_are_those_that_torch_loads(cases: Path, name: str) -> None:
    checkpoint = Checkpoint.open(cases / name)
    assert check_against_torch(checkpoint) >= 9
    assert checkpoint.iteration == ITERATION


def test_values_of_megatrons_classes_are_notes(cases: Path) -> None:
    import megatron.core.safe_globals  # noqa: F401 - registers its classes with torch: they must stay notes all the same

    backend = Checkpoint.open(cases / "gqa_padded").args.attention_backend
    assert repr(backend) == "<saved megatron.core.transformer.enums.AttnBackend(5,)>"


def test_a_direction_that_is_absent_or_unknown_is_refused(cases: Path) -> None:
    checkpoint = Checkpoint.open(cases / "mha")
    assert checkpoint.direction is Direction.FORWARD
    checkpoint.args.direction = "sideways"
    with pytest.raises(DirectionError, match="sideways"):
        _ = checkpoint.direction
    del checkpoint.args.direction
    with pytest.raises(CheckpointError, match="does not say in which direction"):
        _ = checkpoint.direction


def test_names_and_slices_that_are_not_there(cases: Path) -> None:
    checkpoint = Checkpoint.open(cases / "mha")
    with pytest.raises(CheckpointError, match=r"no tensor decoder\.nothing"):
        checkpoint.read("decoder.nothing")
    with pytest.raises(CheckpointError, match="slice 2 was asked for"):
        checkpoint.read_slice("decoder.layers.mlp.linear_fc2.weight", 2)


def remove(*names: str) -> Callable[[Path], None]:
    def damage(save: Path) -> None:
        for name in names:
            path = save / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda save: (save / name).write_text(text, encoding="utf-8") and None


def shorten(name: str, num_bytes: int) -> Callable[[Path], None]:
    return lambda save: os.truncate(save / name, (save / name).stat().st_size - num_bytes)


TRACKER = "latest_checkpointed_iteration.txt"
STEP = f"iter_{ITERATION:07d}"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove(STEP, TRACKER), "no checkpoint: no latest_checkpointed_iteration.txt and no iter_NNNNNNN"),
        (remove(TRACKER), rf"no finished checkpoint: {STEP} without latest_.*complete: {ITERATION}"),
        (remove(STEP), rf"names step {ITERATION}, but {STEP} is not there"),
        (write(TRACKER, "9"), rf"names step 9.*finished steps: {ITERATION} \(choose one with --step\)"),
        (write(TRACKER, "soon"), "'soon', where the number"),
        (remove(f"{STEP}/.metadata"), r"not a finished checkpoint: \.metadata is missing"),
        (remove(f"{STEP}/metadata.json"), r"not a finished checkpoint: metadata\.json is missing"),
        (remove(f"{STEP}/metadata.json", TRACKER), "no finished checkpoint"),
        (write(f"{STEP}/metadata.json", "{"), "damaged: it should name a sharded_backend"),
        (write(f"{STEP}/metadata.json", '{"sharded_backend": "zarr"}'), "format 'zarr'; this reads torch_dist"),
        (remove(f"{STEP}/__0_0.distcp"), r"__0_0\.distcp is missing"),
        (shorten(f"{STEP}/__0_0.distcp", 1), r"__0_0\.distcp is truncated: \d+ bytes, the index needs \d+"),
        (shorten(f"{STEP}/.metadata", 10), r"\.metadata is damaged"),
        (write(f"{STEP}/.metadata", ""), r"\.metadata is damaged"),
        (lambda save: (step_folder(save) / "mp_rank_00").mkdir(), "old format of one file a rank"),
    ],
)
def test_a_folder_without_a_finished_checkpoint_is_refused(
    save: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(save)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(save)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


class Hostile:
    """Runs a command when an unrestricted unpickler reads it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def change_index(save: Path, change: Callable[[Any], None]) -> None:
    path = step_folder(save) / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


def test_a_hostile_index_is_refused_and_not_run(save: Path, tmp_path: Path) -> None:
    witness = tmp_path / "was_run"
    (step_folder(save) / ".metadata").write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(CheckpointError, match=r"refused: it names posix\.system"):
        Checkpoint.open(save)
    assert not witness.exists()


@pytest.mark.parametrize("is_object", [True, False])
def test_a_hostile_object_is_refused_and_not_run(save: Path, tmp_path: Path, is_object: bool) -> None:
    """Once in place of the arguments, once in place of a tensor."""
    witness, buffer = tmp_path / "was_run", io.BytesIO()
    torch.save([Hostile(witness)], buffer)
    data = step_folder(save) / "__0_0.distcp"
    place = _StorageInfo("__0_0.distcp", data.stat().st_size, len(buffer.getvalue()))
    with data.open("ab") as file:
        file.write(buffer.getvalue())
    name = "decoder.final_layernorm.weight"
    key = MetadataIndex(COMMON_STATE) if is_object else MetadataIndex(name, [0])
    change_index(save, lambda index: index.storage_data.__setitem__(key, place))
    words = r"refused: it names (posix|os)\.system" if is_object else "is damaged"
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(save).read(name)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["../elsewhere.distcp", "/etc/hostname", "a/b", ".."])
def test_a_path_that_leaves_the_folder_is_refused(save: Path, name: str) -> None:
    def leave(index: Any) -> None:
        for key, info in list(index.storage_data.items()):
            index.storage_data[key] = _StorageInfo(name, info.offset, info.length)

    change_index(save, leave)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        Checkpoint.open(save)


def test_an_index_that_claims_more_than_there_is_is_refused_before_memory_is_taken(save: Path) -> None:
    name = "decoder.final_layernorm.weight"

    def grow(index: Any) -> None:
        index.state_dict_metadata[name].size = torch.Size([2**60])

    change_index(save, grow)
    with pytest.raises(CheckpointError, match=f"{name} hold 48 of the {2**60} elements"):
        Checkpoint.open(save).read(name)


def test_damaged_chunks_are_named(save: Path) -> None:
    name = "decoder.final_layernorm.weight"
    stored = Checkpoint.open(save).tensors[name].chunks[0].stored
    with (step_folder(save) / stored.file_name).open("r+b") as file:
        file.seek(stored.start + stored.length - 64)
        file.write(bytes(64))
    with pytest.raises(CheckpointError, match=rf"{name} at byte {stored.start} is damaged"):
        Checkpoint.open(save).read(name)


def test_a_chunk_of_another_shape_is_named(save: Path) -> None:
    name, other = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2.weight"

    def swap(index: Any) -> None:
        index.storage_data[MetadataIndex(name, [0])] = index.storage_data[MetadataIndex(other, [0, 0, 0])]

    change_index(save, swap)
    with pytest.raises(CheckpointError, match=r"the index says torch\.float32 \[48\], the file holds"):
        Checkpoint.open(save).read(name)


def test_a_checkpoint_without_arguments_is_refused(save: Path) -> None:
    change_index(save, lambda index: index.storage_data.pop(MetadataIndex(COMMON_STATE)) and None)
    with pytest.raises(CheckpointError, match="holds no common_state"):
        Checkpoint.open(save)
