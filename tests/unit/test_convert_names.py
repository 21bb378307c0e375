"""The name table: it covers a real Llama model, runs both ways, and lets no key slip through."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ledom.convert import names
from megatron_ledom.errors import CheckpointError

LAYERS = 3


def stacked_shapes(*, tied: bool = False, alias: int = 0) -> dict[str, tuple[int, ...]]:
    """The keys of a checkpoint, with the names in position `alias` where a rule has several."""
    shapes: dict[str, tuple[int, ...]] = {
        names.MEGATRON_LAYERS + rule.megatron[min(alias, len(rule.megatron) - 1)]: (LAYERS, 4)
        for rule in names.LAYER_RULES
    }
    globals_ = (names.EMBEDDING, names.FINAL_NORM, *(() if tied else (names.OUTPUT,)))
    shapes |= {rule.megatron[0]: (4,) for rule in globals_}
    return shapes | {
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight": (LAYERS, 4),
        "chained_0.optimizer.state.exp_avg.output_layer.weight": (4,),
        "rng_state": (2,),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_3": (1,),
    }


def plan(shapes: dict[str, tuple[int, ...]], *, tied: bool = False) -> list[names.Item]:
    return names.plan_export(shapes, num_layers=LAYERS, tied=tied, where="CHECKPOINT")


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_parameter_of_a_llama_and_no_other(tied: bool) -> None:
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        vocab_size=8,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sorted(names.hf_names(LAYERS, tied=tied)) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("alias", [0, 1])
def test_a_plan_produces_every_name_once_and_in_order(tied: bool, alias: int) -> None:
    items = plan(stacked_shapes(tied=tied, alias=alias), tied=tied)
    assert [name for item in items for name in item.hf] == names.hf_names(LAYERS, tied=tied)


def test_both_ways_give_the_same_pairs() -> None:
    for item in plan(stacked_shapes()):
        for name in item.hf:
            assert names.megatron_name(name) == (item.megatron, item.layer)


def test_layers_of_their_own_names_are_understood() -> None:
    shapes = {
        f"{names.MEGATRON_LAYERS}{i}.{rule.megatron[0]}": (4,) for i in range(LAYERS) for rule in names.LAYER_RULES
    }
    shapes |= {rule.megatron[0]: (4,) for rule in (names.EMBEDDING, names.FINAL_NORM, names.OUTPUT)}
    items = plan(shapes)
    assert {item.megatron for item in items} == set(shapes)
    assert all(item.layer is None for item in items)


def test_every_missing_weight_is_named() -> None:
    for key in [k for k in stacked_shapes() if names.is_weight(k)]:
        shapes = {k: v for k, v in stacked_shapes().items() if k != key}
        with pytest.raises(CheckpointError, match="lacks weights") as raised:
            plan(shapes)
        assert key in str(raised.value)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.final_layernorm.bias",
        "embedding.position_embeddings.weight",
        "decoder.layers.mlp.linear_fc2.wieght",
        "mtp.layers.0.eh_proj.weight",
    ],
)
def test_an_unknown_weight_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match="no place in a Llama") as raised:
        plan(stacked_shapes() | {key: (LAYERS, 4)})
    assert key in str(raised.value)


def test_an_output_layer_beside_tied_embeddings_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"output_layer\.weight"):
        plan(stacked_shapes(tied=False), tied=True)


def test_a_stack_of_another_depth_is_refused() -> None:
    with pytest.raises(CheckpointError, match="should hold 3 layers"):
        plan(stacked_shapes() | {"decoder.layers.mlp.linear_fc2.weight": (4, 4)})


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.x.mlp.up_proj.weight", "h.0"])
def test_a_foreign_hugging_face_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a tensor of a Llama"):
        names.megatron_name(name)
