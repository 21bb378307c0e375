"""Which model folders are taken, which are refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import edit_config, save_random_model

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DirectionError, InputError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM, load_lm
from megatron_ledom.inference.folder import load_record


@pytest.fixture
def forward(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return save_random_model(tmp_path / "forward", tokenizer_folder, "forward")


@pytest.fixture
def reverse(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return save_random_model(tmp_path / "reverse", tokenizer_folder, "reverse")


@pytest.fixture
def unlabelled(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return save_random_model(tmp_path / "unlabelled", tokenizer_folder, None)


def test_each_kind_of_model_loads_as_what_it_is(forward: Path, reverse: Path, unlabelled: Path) -> None:
    assert isinstance(load_lm(reverse, device="cpu"), ReverseLM)
    assert isinstance(load_lm(forward, device="cpu"), ForwardLM)
    assert isinstance(load_lm(unlabelled, device="cpu"), ForwardLM)
    lm = ReverseLM.load(unlabelled, device="cpu", assume_direction="reverse")
    assert (lm.direction, lm.boundary_id, lm.context_tokens) == (Direction.REVERSE, 0, 256)
    assert lm._stop_ids() == [0]


def test_a_forward_model_is_refused_as_the_reverse_one(forward: Path) -> None:
    with pytest.raises(DirectionError, match=r"forward is a forward model .*a reverse model is needed"):
        ReverseLM.load(forward, device="cpu")
    with pytest.raises(DirectionError, match="is a forward model"):  # its own word counts, not the assumption
        ReverseLM.load(forward, device="cpu", assume_direction=Direction.REVERSE)


def test_a_reverse_model_is_refused_as_the_forward_one(reverse: Path) -> None:
    with pytest.raises(DirectionError, match=r"is a reverse model .*a forward model is needed"):
        ForwardLM.load(reverse, device="cpu")


def test_a_model_without_a_record_needs_the_users_word(unlabelled: Path) -> None:
    with pytest.raises(DirectionError, match="--assume-reverse"):
        ReverseLM.load(unlabelled, device="cpu")
    with pytest.raises(DirectionError, match="was said to be a reverse model"):
        ForwardLM.load(unlabelled, device="cpu", assume_direction="reverse")
    with pytest.raises(DirectionError, match="assume_direction says direction 'backwards'"):
        ReverseLM.load(unlabelled, device="cpu", assume_direction="backwards")


@pytest.mark.parametrize("record", [{"direction": "sideways"}, {}, "reverse"])
def test_a_record_that_names_no_direction_is_refused(reverse: Path, record: object) -> None:
    edit_config(reverse, ledom=record)
    with pytest.raises(DirectionError, match=r"config\.json, key ledom\.direction"):
        load_record(reverse)


def test_folders_that_are_no_models_are_refused(tmp_path: Path, reverse: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        load_record(tmp_path / "absent")
    with pytest.raises(InputError, match="it is a file"):
        load_record(reverse / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_record(tmp_path / "empty")
    (reverse / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_record(reverse)
    (reverse / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list"):
        load_record(reverse)


def test_a_folder_without_tokenizer_is_refused(reverse: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (reverse / name).unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        ReverseLM.load(reverse, device="cpu")


def test_weights_that_are_absent_damaged_or_incomplete_are_refused(reverse: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = reverse / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing .*model\.layers\.1\.mlp\.up_proj\.weight"):
        ReverseLM.load(reverse, device="cpu")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not load with transformers"):
        ReverseLM.load(reverse, device="cpu")
    weights.unlink()
    with pytest.raises(InputError, match="does not load with transformers"):
        ReverseLM.load(reverse, device="cpu")


def test_tied_embeddings_are_not_taken_for_missing_weights(tokenizer_folder: Path, tmp_path: Path) -> None:
    from random_models import save_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    folder = save_model(LlamaForCausalLM, config, tmp_path / "tied", tokenizer_folder, "reverse")
    assert ReverseLM.load(folder, device="cpu").logprob("a", "b").logprob < 0


def test_cuda_is_refused_where_there_is_none(reverse: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda"):
            ReverseLM.load(reverse, device="cuda")


def test_a_forward_model_of_others_starts_with_what_its_tokenizer_puts_first(
    unlabelled: Path, reverse: Path, tmp_path: Path
) -> None:
    import json

    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    for folder in (unlabelled, reverse):
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(["<s>"])
        start_id = backend.token_to_id("<s>")
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start_id)])
        backend.save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>"}))
    assert ForwardLM.load(unlabelled, device="cpu").boundary_id == start_id
    lm = ReverseLM.load(reverse, device="cpu")
    assert lm.boundary_id == 0
    assert lm.encode("a") == [i for i in lm.tokenizer.encode("a") if i != start_id]
    assert lm._stop_ids() == [0, start_id]


def test_a_tokenizer_without_an_end_of_text_is_refused(reverse: Path) -> None:
    (reverse / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    edit_config(reverse, eos_token_id=None)
    with pytest.raises(InputError, match="end-of-text"):
        ReverseLM.load(reverse, device="cpu")
