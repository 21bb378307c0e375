"""A transformers model on our kernels: what they serve, what they leave, and that they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import sdpa_attention

from megatron_ledom.inference import cpu_kernels
from megatron_ledom.inference.cpu_kernels import LEAST_ROWS, NAME, FasterLinear, attend, use_cpu_kernels
from megatron_ledom.ops import products


def llama(**changes: Any) -> Any:
    torch.manual_seed(3)
    fixed = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**{**fixed, **heads, **changes})).eval()


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the queries that went to transformers' own function."""
    calls: list[int] = []
    own = sdpa_attention.sdpa_attention_forward

    def counted(module: Any, query: torch.Tensor, *others: Any, **named: Any) -> Any:
        calls.append(query.shape[2])
        return own(module, query, *others, **named)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    return calls


@pytest.mark.parametrize("is_faster", [True, False])
def test_logits_are_those_of_the_plain_model(
    monkeypatch: pytest.MonkeyPatch, sdpa_calls: list[int], is_faster: bool
) -> None:
    monkeypatch.setattr(products, "is_onednn_faster", lambda: is_faster)
    plain, model = llama(), llama()
    use_cpu_kernels(model)
    assert model.config._attn_implementation == NAME
    assert any(type(m) is FasterLinear for m in model.modules()) is is_faster
    ids = torch.randint(0, 96, (3, 41))
    with torch.inference_mode():
        expected = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=2e-5, atol=2e-6)
        assert not sdpa_calls, "whole sequences under a causal mask are the kernels'"
        mask = torch.ones_like(ids)
        mask[1, :7] = 0  # padding on the left needs a mask that is written out
        expected = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=2e-5, atol=2e-6)
        assert sdpa_calls[-2:] == [41, 41]
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids[:1], **settings), plain.generate(ids[:1], **settings))
        assert sdpa_calls[-1] == 1, "a token behind a cache is transformers' own"


def test_other_types_gradients_and_short_inputs_keep_torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def spy(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(x.shape))
        return x @ w.t()

    monkeypatch.setattr(products, "linear", spy)
    layer = torch.nn.Linear(8, 5, bias=False)
    layer.__class__ = FasterLinear
    long, short = torch.randn(2, LEAST_ROWS, 8), torch.randn(LEAST_ROWS - 1, 8)
    with torch.inference_mode():
        torch.testing.assert_close(layer(long), long @ layer.weight.t())
        layer(short)
        layer.double()(long.double())
    layer.float()(long).sum().backward()
    assert asked == [tuple(long.shape)]
    assert layer.weight.grad is not None


def test_what_the_kernels_do_not_compute_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_onednn_faster", lambda: True)
    for model in (llama().double(), llama().bfloat16(), llama(attn_implementation="eager")):
        before = model.config._attn_implementation
        use_cpu_kernels(model)
        assert model.config._attn_implementation == before
    model = llama()
    monkeypatch.setattr(cpu_kernels, "cpu_paths", tuple)
    use_cpu_kernels(model)
    assert model.config._attn_implementation == "sdpa", "the extension is not built"
    biased = llama(attention_bias=True)
    use_cpu_kernels(biased)
    assert type(biased.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(biased.model.layers[0].mlp.up_proj) is FasterLinear


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({}, True),
        ({"position_ids": torch.zeros(1, 9)}, True),
        ({"sliding_window": None, "softcap": None}, True),
        ({"sliding_window": 4}, False),
        ({"is_causal": False}, False),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, False),
        ({"dropout": 0.5}, False),
        ({"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()}, False),
    ],
)
def test_attention_takes_only_what_it_knows(sdpa_calls: list[int], changes: dict[str, Any], is_ours: bool) -> None:
    module = llama().model.layers[0].self_attn
    query, key, value = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    with torch.inference_mode():
        attend(module, query, key, value, **{"attention_mask": None, "scaling": 0.25, **changes})
    assert sdpa_calls == ([] if is_ours else [9])
