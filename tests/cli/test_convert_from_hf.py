"""tools/convert_from_hf.py as a user runs it: what it makes, and what it refuses before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from random_models import edit_config, save_random_model
from safetensors.torch import load_file, save_file

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.checkpoint.integrity import verify_checksums
from megatron_ledom.convert.from_hf import ImportOptions, import_folder
from megatron_ledom.errors import LedomError
from megatron_ledom.testing import run_tool


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return save_random_model(tmp_path_factory.mktemp("import") / "hf", tokenizer_folder, "reverse")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A folder of one's own to damage."""
    return Path(shutil.copytree(original, tmp_path / "hf"))


def test_the_checkpoint_says_what_it_is(original: Path, tmp_path: Path) -> None:
    save = tmp_path / "imported"
    done = run_tool("convert_from_hf.py", "--load", original, "--save", save, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "reverse model, 205,120 parameters in bfloat16" in done.stdout and "parity: " in done.stdout
    assert sorted(path.name for path in save.iterdir()) == [
        *("import.json", "latest_checkpointed_iteration.txt", "parity.json", "release", "tokenizer")
    ]
    assert [path.name for path in save.parent.iterdir()] == ["imported"]  # nothing temporary is left
    assert verify_checksums(save / "release")
    checkpoint = Checkpoint.open(save)
    assert (checkpoint.iteration, str(checkpoint.direction), checkpoint.folder.name) == (0, "reverse", "release")
    assert checkpoint.dtype("output_layer.weight") == torch.bfloat16 and checkpoint.args.bf16
    assert checkpoint.args.tokenizer_fingerprint.startswith("sha256:")
    record = json.loads((save / "import.json").read_text())
    assert record["source"] == str(original) and record["source_config"]["hidden_size"] == 64
    assert json.loads((save / "parity.json").read_text())["passed"] is True
    again = run_tool("convert_from_hf.py", "--load", original, "--save", save)
    assert again.returncode == 2 and "exists; choose another name, or replace it with --overwrite" in again.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def drop_a_tensor(folder: Path) -> None:
    kept = weights(folder)
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, folder / "model.safetensors")


def add_a_bias(folder: Path) -> None:
    save_file(weights(folder) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, folder / "model.safetensors")


def cut_a_tensor(folder: Path) -> None:
    kept = weights(folder)
    kept["lm_head.weight"] = kept["lm_head.weight"][:1000].contiguous()
    save_file(kept, folder / "model.safetensors")


def poison(folder: Path) -> None:
    kept = weights(folder)
    kept["model.norm.weight"][3] = float("nan")
    save_file(kept, folder / "model.safetensors")


def untie(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)


def mix(folder: Path) -> None:
    kept = weights(folder)
    save_file(kept | {"model.norm.weight": kept["model.norm.weight"].bfloat16()}, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pickled(folder: Path) -> None:
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_record(folder: Path) -> None:
    edit_config(folder, ledom=None)


def more_ids(folder: Path) -> None:
    edit_config(folder, vocab_size=1000)


def other_tokenizer(folder: Path) -> None:
    edit_config(folder, ledom={"format_version": 1, "direction": "reverse", "tokenizer_fingerprint": "sha256:0"})


REFUSALS = {
    drop_a_tensor: "lacks model.layers.1.mlp.up_proj.weight",
    add_a_bias: "holds model.layers.0.self_attn.q_proj.bias, which have no place in a Llama without biases",
    cut_a_tensor: "lm_head.weight is [1000, 64], config.json gives [1024, 64]",
    poison: "model.safetensors: model.norm.weight is not finite in float32",
    untie: "says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight",
    mix: "stores its weights as bfloat16, float32; choose one with --dtype",
    truncate: "model.safetensors is truncated",
    pickled: "pickled weights are not read, because reading them runs what they hold",
    no_record: "give --direction reverse or forward",
    more_ids: "has 1024 ids, ",
    other_tokenizer: "says that the model was trained with tokenizer sha256:0",
}


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__)
def test_a_folder_that_does_not_fit_is_refused_and_leaves_nothing(damage, folder: Path, tmp_path: Path) -> None:
    damage(folder)
    with pytest.raises(LedomError) as refusal:
        import_folder(folder, tmp_path / "imported", options=ImportOptions(parity=False))
    assert REFUSALS[damage] in str(refusal.value) and str(folder) in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_only_an_untouched_import_is_overwritten(folder: Path, tmp_path: Path) -> None:
    save = tmp_path / "imported"
    options = ImportOptions(parity=False, overwrite=True)
    import_folder(folder, save, options=options)
    import_folder(folder, save, options=options)
    (save / "iter_0000010").mkdir()
    with pytest.raises(LedomError, match="holds iter_0000010, trained weights: not even --overwrite"):
        import_folder(folder, save, options=options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(LedomError, match="is not an earlier import"):
        import_folder(folder, tmp_path / "other", options=options)
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_folder_without_a_tokenizer_takes_one_by_name(folder: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    import_folder(folder, tmp_path / "none", options=ImportOptions(parity=False))
    assert not (tmp_path / "none" / "tokenizer").exists()
    assert Checkpoint.open(tmp_path / "none").args.tokenizer_fingerprint is None
    import_folder(folder, tmp_path / "named", options=ImportOptions(parity=False, tokenizer=tokenizer_folder))
    assert Checkpoint.open(tmp_path / "named").args.tokenizer_type == "HuggingFaceTokenizer"
    assert (tmp_path / "named" / "tokenizer" / "tokenizer.json").is_file()


def test_a_tied_folder_may_hold_an_equal_copy(tmp_path: Path, folder: Path) -> None:
    kept = weights(folder)
    save_file(kept | {"lm_head.weight": kept["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    edit_config(folder, tie_word_embeddings=True)
    result = import_folder(folder, tmp_path / "imported", options=ImportOptions(parity=False))
    assert result.num_parameters == 205_120 - 1024 * 64
    assert "output_layer.weight" not in Checkpoint.open(tmp_path / "imported").tensors
