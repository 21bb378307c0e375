"""Batched continuations equal those written one at a time, and end where they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import save_random_model

from megatron_ledom.errors import InputError
from megatron_ledom.inference import ForwardLM
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.rerank.sampler import continue_texts
from megatron_ledom.rerank.steps import build_step_end

PROMPTS = ["The operand", "A much longer prompt, which says that", "def", "if the value is not there:"]


@pytest.fixture(scope="module")
def lm(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ForwardLM:
    folder = tmp_path_factory.mktemp("models") / "forward"
    return ForwardLM.load(save_random_model(folder, tokenizer_folder, "forward", seed=3), device="cpu")


def test_greedy_batches_of_any_size_give_what_generate_gives_one_at_a_time(lm: ForwardLM) -> None:
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([[lm.boundary_id, *lm.encode(prompt)]])
        grown = lm.model.generate(input_ids=ids, do_sample=False, max_new_tokens=20, eos_token_id=0, pad_token_id=0)
        new = [i for i in grown[0, ids.shape[1] :].tolist() if i != 0]
        expected.append(lm.decode([*ids[0, 1:].tolist(), *new]).removeprefix(prompt))
    for batch_rows in (1, 3, 128):
        sampling = Sampling(max_new_tokens=20, greedy=True)
        found = continue_texts(lm, PROMPTS, sampling, batch_rows=batch_rows)
        assert [row[0].text for row in found] == expected


def test_samples_differ_repeat_with_the_seed_and_leave_torchs_state_alone(lm: ForwardLM) -> None:
    before = torch.get_rng_state()
    sampling = Sampling(max_new_tokens=12, num_samples=5, seed=7)
    first, again = continue_texts(lm, PROMPTS, sampling), continue_texts(lm, PROMPTS, sampling)
    assert first == again
    assert [len(row) for row in first] == [5] * 4
    assert all(len({c.text for c in row}) > 1 for row in first)
    assert first != continue_texts(lm, PROMPTS, Sampling(max_new_tokens=12, num_samples=5, seed=8))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_tokens_follow_the_models_distribution(lm: ForwardLM) -> None:
    ids = torch.tensor([[lm.boundary_id, *lm.encode(PROMPTS[0])]])
    probabilities = lm.model(input_ids=ids).logits[0, -1].detach().softmax(-1)
    drawn = continue_texts(lm, PROMPTS[:2], Sampling(max_new_tokens=1, num_samples=2000, seed=1), batch_rows=500)[0]
    likeliest = int(probabilities.argmax())
    text = lm.decode([*ids[0, 1:].tolist(), likeliest]).removeprefix(PROMPTS[0])
    p = float(sum(q for token, q in enumerate(probabilities) if lm.decode([token]) == lm.decode([likeliest])))
    share = sum(c.text == text for c in drawn) / 2000
    assert p > 0.02
    assert abs(share - p) < 4 * (p * (1 - p) / 2000) ** 0.5


def test_a_step_ends_at_the_end_that_is_asked_for_and_is_not_taken_for_the_documents_end(lm: ForwardLM) -> None:
    find_end = build_step_end("pattern", pattern="[aeiou]")
    sampling = Sampling(max_new_tokens=40, num_samples=20, seed=2)
    whole = continue_texts(lm, PROMPTS[:2], sampling)
    cut = continue_texts(lm, PROMPTS[:2], sampling, find_end=find_end)
    ended = 0
    for row in cut:
        for continuation in row:
            end = find_end(continuation.text)
            if end is not None:
                ended += 1
                assert end == len(continuation.text)
                assert not continuation.finished
                assert continuation.num_tokens < 40
    assert ended > 30
    assert max(c.num_tokens for row in whole for c in row) == 40


def test_the_documents_end_is_told_from_the_token_limit(lm: ForwardLM) -> None:
    drawn = continue_texts(lm, PROMPTS[:1], Sampling(max_new_tokens=30, num_samples=400, seed=2))[0]
    finished = [c for c in drawn if c.finished]
    assert 0 < len(finished) < 400
    assert all(c.num_tokens < 30 for c in finished)
    assert all(c.num_tokens == 30 for c in drawn if not c.finished)


def test_what_does_not_fit_is_refused_by_name(lm: ForwardLM) -> None:
    with pytest.raises(InputError, match=r"line 9 and 250 new tokens: 2.. tokens with the boundary"):
        continue_texts(lm, [PROMPTS[1]], Sampling(max_new_tokens=250), what=lambda i: "line 9")
