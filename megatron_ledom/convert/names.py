"""The two-way table between Megatron's `torch_dist` keys and Hugging Face's Llama keys.

The table is data: one `Rule` a weight. `plan_export` applies it to a whole checkpoint and
refuses any key that it cannot place and any weight that is absent, so that no renamed
tensor can vanish from an export. How a packed tensor is taken apart is `tensors`.

A layer's key is written `decoder.layers.<rest>` where Megatron stacks the layers on a
leading axis (the ordinary case), and `decoder.layers.<i>.<rest>` where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_ledom.errors import CheckpointError

Packing = Literal["none", "qkv", "gate_up", "vocabulary"]

MEGATRON_LAYERS = "decoder.layers."
HF_LAYERS = "model.layers."


@dataclass(frozen=True)
class Rule:
    """One weight under both names.

    Attributes:
        megatron: Megatron's names for it; the first one is that of Transformer Engine's modules
            and of 0.19's local ones, others are what local modules were called before.
        hf: the Hugging Face tensors that it becomes, in the order in which it is taken apart.
        packing: how it is taken apart.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    packing: Packing = "none"


EMBEDDING = Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), "vocabulary")
FINAL_NORM = Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",))
OUTPUT = Rule(("output_layer.weight",), ("lm_head.weight",), "vocabulary")

LAYER_RULES = (
    Rule(
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("input_layernorm.weight",),
    ),
    Rule(
        ("self_attention.linear_qkv.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    Rule(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",)),
    Rule(
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("post_attention_layernorm.weight",),
    ),
    Rule(("mlp.linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    Rule(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",)),
)

NOT_WEIGHTS = (
    re.compile(r"(chained_\d+\.)?optimizer\."),
    re.compile(r"(rng_state|rerun_state_machine_state|common_state)(/|$)"),
    re.compile(r".*\._extra_state(/|$)"),  # FP8 scales of Transformer Engine; empty otherwise
)
"""What else a checkpoint holds: recognised, and left behind on purpose."""


@dataclass(frozen=True)
class Item:
    """One read of an export: which tensor, which of its layers, and what it becomes.

    Attributes:
        megatron: the key in the checkpoint.
        layer: the index on the leading axis, or None where the whole tensor is meant.
        hf: the full Hugging Face names.
        packing: how it is taken apart.
    """

    megatron: str
    layer: int | None
    hf: tuple[str, ...]
    packing: Packing


def is_weight(key: str) -> bool:
    """Whether `key` is a weight of the model, rather than optimizer state, random state or an extra state."""
    return not any(pattern.match(key) for pattern in NOT_WEIGHTS)


def hf_names(num_layers: int, *, tied: bool) -> list[str]:
    """Every tensor name of a Llama model of `num_layers` layers, in the order in which an export writes them."""
    layers = [f"{HF_LAYERS}{i}.{name}" for i in range(num_layers) for rule in LAYER_RULES for name in rule.hf]
    return [*EMBEDDING.hf, *layers, *FINAL_NORM.hf, *([] if tied else OUTPUT.hf)]


def megatron_name(hf_name: str) -> tuple[str, int | None]:
    """The stacked Megatron key of a Hugging Face tensor, and its layer (None outside the layers).

    >>> megatron_name("model.layers.3.self_attn.k_proj.weight")
    ('decoder.layers.self_attention.linear_qkv.weight', 3)

    Raises:
        CheckpointError: a Llama model has no tensor of that name.
    """
    for rule in (EMBEDDING, FINAL_NORM, OUTPUT):
        if hf_name in rule.hf:
            return rule.megatron[0], None
    match = re.fullmatch(re.escape(HF_LAYERS) + r"(\d+)\.(.+)", hf_name)
    for rule in LAYER_RULES:
        if match and match.group(2) in rule.hf:
            return MEGATRON_LAYERS + rule.megatron[0], int(match.group(1))
    raise CheckpointError(f"{hf_name} is not a tensor of a Llama model without biases")


def plan_export(shapes: Mapping[str, tuple[int, ...]], *, num_layers: int, tied: bool, where: str) -> list[Item]:
    """Decide what every weight of a checkpoint becomes.

    Args:
        shapes: key to shape, of everything in the checkpoint; optimizer and random states are passed over.
        num_layers: of the model.
        tied: the output layer shares the embedding's weight and has none of its own.
        where: names the checkpoint in messages.

    Returns:
        The reads, in the order of `hf_names`; each weight is in it exactly once per layer.

    Raises:
        CheckpointError: a weight is missing, or a key is left over that the table does not know.
    """
    weights = {key for key in shapes if is_weight(key)}
    items: list[Item] = []
    missing: list[str] = []
    used: set[str] = set()

    def place(rule: Rule, key: str | None, layer: int | None, prefix: str = "") -> None:
        if key is None:
            return
        used.add(key)
        items.append(Item(key, layer, tuple(prefix + name for name in rule.hf), rule.packing))

    def choose(candidates: Iterable[str]) -> str | None:
        names = list(candidates)
        found = [name for name in names if name in weights]
        if not found:
            missing.append(names[0])
        return found[0] if found else None

    place(EMBEDDING, choose(EMBEDDING.megatron), None)
    for layer in range(num_layers):
        for rule in LAYER_RULES:
            stacked = [MEGATRON_LAYERS + name for name in rule.megatron]
            single = [f"{MEGATRON_LAYERS}{layer}.{name}" for name in rule.megatron]
            key = choose(stacked + single)
            place(rule, key, layer if key in stacked else None, f"{HF_LAYERS}{layer}.")
    place(FINAL_NORM, choose(FINAL_NORM.megatron), None)
    if not tied:
        place(OUTPUT, choose(OUTPUT.megatron), None)
    _check_complete(weights - used, missing, where)
    _check_depth(items, shapes, num_layers, where)
    return items


def _check_complete(unknown: set[str], missing: list[str], where: str) -> None:
    if missing:
        raise CheckpointError(f"{where} lacks weights of a Llama model: {_some(list(dict.fromkeys(missing)))}")
    if unknown:
        raise CheckpointError(
            f"{where} holds tensors that have no place in a Llama model: {_some(sorted(unknown))}. "
            "Nothing is left out silently: the model is of another architecture"
        )


def _check_depth(items: list[Item], shapes: Mapping[str, tuple[int, ...]], num_layers: int, where: str) -> None:
    for item in items:
        if item.layer is not None and shapes[item.megatron][:1] != (num_layers,):
            raise CheckpointError(
                f"{where}: {item.megatron} {list(shapes[item.megatron])} should hold {num_layers} layers (num_layers)"
            )


def _some(names: list[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
