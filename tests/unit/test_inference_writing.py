"""Writing leftwards: the same tokens as transformers on ids turned round by hand; seeds, stops and seams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_models import save_random_model

from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.inference import ReverseLM
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.testing import english_documents

LATER = " is evaluated before the statement."


@pytest.fixture(scope="module")
def lm(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ReverseLM:
    return ReverseLM.load(save_random_model(tmp_path_factory.mktemp("m"), tokenizer_folder, "reverse"), device="cpu")


@pytest.mark.parametrize("text", [LATER, "été", english_documents()[3][:400], ""])
def test_greedy_equals_transformers_on_hand_flipped_ids(lm: ReverseLM, text: str) -> None:
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    prompt = torch.tensor([[0, *ids[::-1]]])
    grown = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    new = grown[0, prompt.shape[1] :].tolist()
    new = new[: new.index(0)] if 0 in new else new
    whole = lm.tokenizer.decode((new[::-1]) + ids)
    (written,) = lm.write(text, Sampling(max_new_tokens=40, greedy=True))
    assert written.num_tokens == len(new)
    assert written.whole == whole
    assert written.earlier + text == whole
    assert lm.write_before(text, max_new_tokens=40, greedy=True) == [written.earlier]


def test_the_cache_changes_nothing(lm: ReverseLM) -> None:
    """Each token is the likeliest one under a full forward pass over everything before it."""
    (written,) = lm.write(LATER, Sampling(max_new_tokens=12, greedy=True))
    ids = [0, *lm.encode(LATER)[::-1]]
    for _ in range(written.num_tokens):
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert lm.decode(ids[1:][::-1]) == written.whole


def test_a_seed_gives_the_same_texts_and_another_seed_others(lm: ReverseLM) -> None:
    def write(seed: int) -> list[str]:
        return lm.write_before(
            LATER, max_new_tokens=20, temperature=0.9, top_k=200, top_p=0.95, seed=seed, num_samples=3
        )

    torch.manual_seed(1)
    first, state = write(5), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are left alone
    torch.rand(7)
    assert write(5) == first
    assert len(set(first)) == 3
    assert write(6) != first


def test_samples_follow_the_models_probabilities(lm: ReverseLM) -> None:
    """400 first tokens of a sharpened distribution: the frequency of the likeliest one within 4 standard errors."""
    prompt = torch.tensor([[0, *lm.encode(LATER)[::-1]]])
    probabilities = (lm.model(prompt).logits[0, -1].detach().double() / 0.5).softmax(-1)
    best = float(probabilities.max())
    results = lm.write(LATER, Sampling(max_new_tokens=1, temperature=0.5, num_samples=400, seed=2))
    token = lm.decode([int(probabilities.argmax())])
    share = sum(r.whole == token + LATER for r in results) / 400
    assert 0.05 < best < 0.95
    assert abs(share - best) < 4 * (best * (1 - best) / 400) ** 0.5


def test_writing_stops_at_the_beginning_of_the_document(lm: ReverseLM) -> None:
    results = lm.write(LATER, Sampling(max_new_tokens=100, temperature=3.0, num_samples=32, seed=0))
    finished = [r for r in results if r.reached_beginning]
    assert 0 < len(finished) < len(results)
    assert all(r.num_tokens < 100 for r in finished)
    assert all(r.num_tokens == 100 for r in results if not r.reached_beginning)
    assert not any("<|endoftext|>" in r.whole for r in results)
    assert all(r.whole.endswith(LATER) for r in results)


def test_top_k_of_one_is_greedy(lm: ReverseLM) -> None:
    greedy = lm.write_before(LATER, max_new_tokens=20, greedy=True)
    assert lm.write_before(LATER, max_new_tokens=20, top_k=1) == greedy
    assert lm.write_before(LATER, max_new_tokens=20, top_p=1e-6) == greedy


def test_min_p_keeps_what_is_likely_beside_the_likeliest(lm: ReverseLM) -> None:
    assert lm.write_before(LATER, max_new_tokens=20, min_p=0.999) == lm.write_before(
        LATER, max_new_tokens=20, greedy=True
    )
    prompt = torch.tensor([[0, *lm.encode(LATER)[::-1]]])
    probabilities = lm.model(prompt).logits[0, -1].detach().double().softmax(-1)
    kept = torch.nonzero(probabilities >= 0.3 * probabilities.max())[:, 0].tolist()
    results = lm.write(LATER, Sampling(max_new_tokens=1, num_samples=200, min_p=0.3))
    assert 1 < len(kept) < 20
    assert {r.whole for r in results} == {lm.decode([i]) + LATER for i in kept}


def test_what_is_written_so_far_is_told_after_each_token(lm: ReverseLM) -> None:
    sampling = Sampling(max_new_tokens=12, num_samples=3, seed=4)
    told: list[list[str]] = []
    results = lm.write(LATER, sampling, on_step=lambda samples: told.append([s.whole for s in samples]))
    assert results == lm.write(LATER, sampling)
    assert len(told) == 12
    assert told[-1] == [r.whole for r in results]


def test_settings_in_the_models_folder_do_not_leak_in(tokenizer_folder: Path, tmp_path: Path, lm: ReverseLM) -> None:
    folder = save_random_model(tmp_path / "m", tokenizer_folder, "reverse")
    settings = {"repetition_penalty": 9.0, "top_k": 1, "do_sample": True, "min_p": 0.9, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other = ReverseLM.load(folder, device="cpu")
    for sampling in (Sampling(20, greedy=True), Sampling(20, seed=3)):
        assert other.write(LATER, sampling) == lm.write(LATER, sampling)


def test_more_than_the_context_is_refused(lm: ReverseLM) -> None:
    num_tokens = len(lm.encode(LATER))
    lm.write(LATER, Sampling(max_new_tokens=256 - 1 - num_tokens, greedy=True))
    with pytest.raises(InputError, match=r"257 tokens with the boundary, but .* at most 256"):
        lm.write(LATER, Sampling(max_new_tokens=256 - num_tokens, greedy=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.0),
        ("seed", -1),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        Sampling(**{name: value})


def test_greedy_writes_one_text() -> None:
    with pytest.raises(UsageError, match="1 with greedy"):
        Sampling(greedy=True, num_samples=2)


def test_a_model_in_bfloat16_writes_and_scores(lm: ReverseLM) -> None:
    rough = ReverseLM.load(lm.record.folder, device="cpu", dtype=torch.bfloat16)
    assert rough.logprob("The expression", LATER).logprob == pytest.approx(
        lm.logprob("The expression", LATER).logprob, rel=0.05
    )
    assert len(rough.write_before(LATER, max_new_tokens=3)) == 1
