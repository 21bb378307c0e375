"""Weights from strangers, given to the tools: nothing in them runs, nothing outside them is read, nothing is left."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from convert_cases import ITERATION
from in_process import run_in_process
from random_models import edit_config, save_random_model
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ledom.checkpoint.reader import COMMON_STATE
from megatron_ledom.testing import run_tool

STEP = f"iter_{ITERATION:07d}"
NORM = "decoder.final_layernorm.weight"
SHARD = "model.safetensors"
Damage = Callable[[Path, Path], None]
"""Given a folder and the witness: a file that exists once hostile code has run."""


class Hostile:
    """Makes the witness when an unrestricted unpickler reads it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def hostile_module(folder: Path, witness: Path) -> None:
    """A module that makes the witness when it is imported."""
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")


def test_what_is_called_hostile_here_is_hostile(tmp_path: Path) -> None:
    """Without this, the tests below would pass whatever the tools do."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "pickle")))
    torch.save([Hostile(tmp_path / "torch")], tmp_path / "saved.pt")
    torch.load(tmp_path / "saved.pt", weights_only=False)
    hostile_module(tmp_path, tmp_path / "module")
    exec((tmp_path / "evil.py").read_text(), {})
    assert all((tmp_path / name).exists() for name in ("pickle", "torch", "module"))


def change_index(folder: Path, change: Callable[[Any], None]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def put(folder: Path, key: MetadataIndex, value: Any) -> None:
    """Append a `torch.save` record to the data file and have the index find it under `key`."""
    buffer, data = io.BytesIO(), folder / "__0_0.distcp"
    torch.save(value, buffer)
    place = _StorageInfo(data.name, data.stat().st_size, len(buffer.getvalue()))
    with data.open("ab") as file:
        file.write(buffer.getvalue())
    change_index(folder, lambda index: index.storage_data.__setitem__(key, place))


# A Megatron checkpoint. `folder` is the step folder.


def index_is_hostile(folder: Path, witness: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(witness)))


def index_has_a_hostile_name(folder: Path, witness: Path) -> None:
    def rename(index: Any) -> None:
        index.state_dict_metadata["\x1b[2J"] = index.state_dict_metadata.pop(NORM)

    change_index(folder, rename)


def arguments_are_hostile(folder: Path, witness: Path) -> None:
    put(folder, MetadataIndex(COMMON_STATE), [{"args": Hostile(witness), "iteration": 1}])


def chunk_is_hostile(folder: Path, witness: Path) -> None:
    put(folder, MetadataIndex(NORM, [0]), Hostile(witness))


def chunk_is_hostile_and_large(folder: Path, witness: Path) -> None:
    """One record of data, as in a tensor's archive, beside the hostile pickle."""
    put(folder, MetadataIndex(NORM, [0]), [torch.zeros(48), Hostile(witness)])


def chunk_lies_elsewhere(folder: Path, witness: Path) -> None:
    def leave(index: Any) -> None:
        for key, info in list(index.storage_data.items()):
            index.storage_data[key] = _StorageInfo("../elsewhere.distcp", info.offset, info.length)

    shutil.copy(folder / "__0_0.distcp", folder.parent / "elsewhere.distcp")
    change_index(folder, leave)


def data_is_a_link(folder: Path, witness: Path) -> None:
    shutil.move(folder / "__0_0.distcp", folder.parent.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent.parent / "elsewhere")


def list_names_a_file_outside(folder: Path, witness: Path) -> None:
    (folder / "checksums.json").write_text('{"format_version": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}')


def tracker_leaves(folder: Path, witness: Path) -> None:
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("../save/iter_0000007")


ANY_TOOL = ("inspect", "inspect --verify", "export")
CHECKPOINTS: list[tuple[Damage, tuple[str, ...], str]] = [
    (index_is_hostile, ANY_TOOL, r".metadata is refused: it names posix.system"),
    (index_has_a_hostile_name, ANY_TOOL, r".metadata is refused: '\x1b[2J' is no name"),
    (arguments_are_hostile, ANY_TOOL, f"{COMMON_STATE} is refused: it names posix.system"),
    (chunk_is_hostile, ("inspect --verify", "inspect --diff", "export"), f"{NORM} at byte"),
    (chunk_is_hostile_and_large, ("inspect --verify", "inspect --diff", "export"), f"{NORM} at byte"),
    (chunk_lies_elsewhere, ANY_TOOL, ".metadata is refused: it names the file '../elsewhere.distcp', outside"),
    (data_is_a_link, ANY_TOOL, "__0_0.distcp is refused: it leads to "),
    (list_names_a_file_outside, ANY_TOOL, "checksums.json is refused: it names '../x', outside the folder"),
    (tracker_leaves, ANY_TOOL, "holds '../save/iter_0000007', where the number of an iteration should be"),
]


@pytest.fixture
def save(cases: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cases / "gqa_padded", tmp_path / "save"))


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def check_refusal(done: CompletedProcess[str], words: str, *, status: int = 2) -> None:
    told = done.stderr if status == 2 else done.stdout
    assert done.returncode == status and words in told, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    if status == 2:
        assert done.stdout == ""
        assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
        assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("damage", "tool", "words"),
    [(damage, tool, words) for damage, tools, words in CHECKPOINTS for tool in tools],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_checkpoint_is_refused(
    damage: Damage, tool: str, words: str, save: Path, cases: Path, tmp_path: Path
) -> None:
    witness = tmp_path / "was_run"
    damage(save / STEP, witness)
    before = tree(tmp_path)
    status = 2
    if tool == "export":
        done = run_in_process("convert_to_hf.py", "--load", save, "--output", tmp_path / "hf", "--no-parity")
    elif tool == "inspect --diff":
        done = run_in_process("inspect_checkpoint.py", cases / "gqa_padded", "--diff", save)
    else:
        done = run_in_process("inspect_checkpoint.py", save, *tool.split()[1:])
        status = 1 if "chunk_is_hostile" in damage.__name__ else 2
    check_refusal(done, words, status=status)
    assert not witness.exists() and tree(tmp_path) == before


def test_a_hostile_checkpoint_is_refused_on_the_command_line_before_parity(save: Path, tmp_path: Path) -> None:
    """The comparison, which uses torch's and Megatron's own loaders, is on: it must not be reached."""
    witness = tmp_path / "was_run"
    chunk_is_hostile_and_large(save / STEP, witness)
    before = tree(tmp_path)
    check_refusal(run_tool("convert_to_hf.py", "--load", save, "--output", tmp_path / "hf"), f"{NORM} at byte")
    assert not witness.exists() and tree(tmp_path) == before


# A Hugging Face folder.


def only_a_pickle(folder: Path, witness: Path) -> None:
    (folder / SHARD).unlink()
    pickle_beside(folder, witness)


def pickle_beside(folder: Path, witness: Path) -> None:
    torch.save({"model.norm.weight": Hostile(witness)}, folder / "pytorch_model.bin")


def header_of_a_terabyte(folder: Path, witness: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes((2**40).to_bytes(8, "little") + content[8:])


def tensor_of_a_terabyte(folder: Path, witness: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header)


def index_leaves(folder: Path, witness: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / "elsewhere.safetensors")
    content = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def weights_are_a_link(folder: Path, witness: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / "elsewhere.safetensors")
    (folder / SHARD).symlink_to("../elsewhere.safetensors")


def weights_are_a_pipe(folder: Path, witness: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def tokenizer_is_a_link(folder: Path, witness: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder.parent / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to("../elsewhere.json")


def licence_is_a_link(folder: Path, witness: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to("../secret")


def config_is_deep(folder: Path, witness: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def config_names_code(folder: Path, witness: Path) -> None:
    hostile_module(folder, witness)
    edit_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})


def config_names_a_class(folder: Path, witness: Path) -> None:
    hostile_module(folder, witness)
    edit_config(folder, model_type="evil", architectures=["Evil"])


def sums_leave(folder: Path, witness: Path) -> None:
    (folder.parent / "x").write_text("secret")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../x\n")


def sums_are_absolute(folder: Path, witness: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"{'0' * 64} */etc/passwd\n")


def sums_name_no_file(folder: Path, witness: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  a\0b\n")


FOLDERS: list[tuple[Damage, tuple[str, ...], str]] = [
    (only_a_pickle, ("inspect", "inspect --verify", "import"), "pickled weights are not read, because reading them"),
    (header_of_a_terabyte, ("inspect", "inspect --verify", "import"), "its header alone claims 1,099,511,627,776"),
    (tensor_of_a_terabyte, ("inspect", "inspect --verify", "import"), f"{SHARD} is truncated: model.norm.weight ends"),
    (index_leaves, ("inspect", "inspect --verify", "import"), "names the file '../elsewhere.safetensors', outside"),
    (weights_are_a_link, ("inspect", "inspect --verify", "import"), f"{SHARD} is refused: it leads to "),
    (weights_are_a_pipe, ("inspect", "inspect --verify", "import"), f"{SHARD} is refused: it is no file"),
    (tokenizer_is_a_link, ("import",), "tokenizer.json is refused: it leads to "),
    (licence_is_a_link, ("import",), "LICENSE is refused: it leads to "),
    (config_is_deep, ("inspect", "inspect --verify", "import"), "config.json cannot be read as JSON"),
    (config_names_code, ("import",), "auto_map names code of its own, which is never run here"),
    (config_names_a_class, ("import",), "model_type is 'evil', expected 'llama'"),
    (sums_leave, ("inspect", "inspect --verify"), "SHA256SUMS:1 is refused: it names '../x', outside the folder"),
    (sums_are_absolute, ("inspect", "inspect --verify"), "is refused: it names '/etc/passwd', outside the folder"),
    (sums_name_no_file, ("inspect", "inspect --verify"), "SHA256SUMS:1: not a line of sha256sum"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return save_random_model(tmp_path_factory.mktemp("untrusted") / "hf", tokenizer_folder, "reverse")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "hf"))


def use_folder(tool: str, folder: Path, save: Path) -> CompletedProcess[str]:
    if tool == "import":
        return run_in_process("convert_from_hf.py", "--load", folder, "--save", save, "--no-parity")
    return run_in_process("inspect_checkpoint.py", folder, *tool.split()[1:])


@pytest.mark.timeout(60)  # a pipe that is opened blocks for ever
@pytest.mark.parametrize(
    ("damage", "tool", "words"),
    [(damage, tool, words) for damage, tools, words in FOLDERS for tool in tools],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_folder_is_refused(damage: Damage, tool: str, words: str, folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "was_run"
    damage(folder, witness)
    before = tree(tmp_path)
    check_refusal(use_folder(tool, folder, tmp_path / "imported"), words)
    assert not witness.exists() and tree(tmp_path) == before


@pytest.mark.timeout(60)
def test_sums_that_name_a_pipe_or_a_folder_do_not_block(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    (folder / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in ("pipe", "sub")))
    done = run_in_process("inspect_checkpoint.py", folder, "--verify")
    assert done.returncode == 1
    assert f"{folder / 'pipe'} is no file" in done.stdout and f"{folder / 'sub'} is no file" in done.stdout


def test_a_hostile_folder_is_refused_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "was_run"
    config_names_code(folder, witness)
    before = tree(tmp_path)
    done = run_tool("convert_from_hf.py", "--load", folder, "--save", tmp_path / "imported")
    check_refusal(done, "auto_map names code of its own, which is never run here")
    assert not witness.exists() and tree(tmp_path) == before


def tokenizer_names_code(folder: Path, witness: Path, tokenizer_class: str = "Evil") -> None:
    hostile_module(folder, witness)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [config_names_code, tokenizer_names_code, pickle_beside])
def test_inspecting_runs_nothing_that_a_folder_names(damage: Damage, folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "was_run"
    damage(folder, witness)
    done = run_in_process("inspect_checkpoint.py", folder, "--verify", "--tensors")
    assert done.returncode == 0 and "every tensor can be read" in done.stdout
    assert not witness.exists()


@pytest.mark.parametrize("tokenizer_class", ["Evil", "PreTrainedTokenizerFast"])
def test_an_import_takes_weights_and_tokenizer_without_the_code_beside_them(
    tokenizer_class: str, folder: Path, tmp_path: Path
) -> None:
    """With the comparison, for which transformers loads the tokenizer; a class that it does not know is not loaded."""
    witness = tmp_path / "was_run"
    tokenizer_names_code(folder, witness, tokenizer_class)
    pickle_beside(folder, witness)
    done = run_tool("convert_from_hf.py", "--load", folder, "--save", tmp_path / "imported")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert ("on random ids only, transformers cannot load the folder's tokenizer" in done.stderr) == (
        tokenizer_class == "Evil"
    )
    assert not witness.exists()
    assert {path.name for path in (tmp_path / "imported" / "tokenizer").iterdir()} == {
        *("tokenizer.json", "tokenizer_config.json")
    }
    assert "auto_map" not in (tmp_path / "imported" / "tokenizer" / "tokenizer_config.json").read_text()
    assert not list((tmp_path / "imported").rglob("*.py")) and not list((tmp_path / "imported").rglob("*.bin"))


def test_an_export_takes_a_tokenizer_without_the_code_that_it_names(
    cases: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers then takes tokenizer.json, and must give the ids of training."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    witness, tokenizer = tmp_path / "was_run", Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    tokenizer_names_code(tokenizer, witness)
    export = ("--load", cases / "gqa_padded", "--output", tmp_path / "hf", "--no-parity")
    done = run_in_process("convert_to_hf.py", *export, "--tokenizer", tokenizer)
    assert done.returncode == 0, done.stderr
    assert not witness.exists() and not list((tmp_path / "hf").rglob("*.py"))
    assert "auto_map" not in (tmp_path / "hf" / "tokenizer_config.json").read_text()
