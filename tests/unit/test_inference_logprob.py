"""Scores of the batched, chunked path against the plainest computation there is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from random_models import CONTEXT_TOKENS, random_pairs, save_model, save_random_model

from megatron_ledom.direction import ConditionedIds, condition
from megatron_ledom.errors import InputError
from megatron_ledom.inference import DirectedLM, ForwardLM, ReverseLM, scoring
from megatron_ledom.inference.shared_prefix import find_groups
from megatron_ledom.testing import english_documents

# Float32, another batch, another order of additions: nats per token, and a share of a total.
TOKEN_TOLERANCE = 1e-5
TOTAL_TOLERANCE = 1e-6
KINDS = {"forward": ForwardLM, "reverse": ReverseLM}


@pytest.fixture(scope="module", params=["forward", "reverse"])
def lm(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DirectedLM:
    folder = save_random_model(tmp_path_factory.mktemp("model"), tokenizer_folder, request.param)
    return KINDS[request.param].load(folder, device="cpu")


def naive_logprobs(lm: DirectedLM, target: str, given: str) -> list[float]:
    """One pair, full logits, float64 log-softmax; ids turned round by hand. Natural order."""
    target_ids = lm.tokenizer.encode(target, add_special_tokens=False)
    given_ids = lm.tokenizer.encode(given, add_special_tokens=False)
    if lm.direction == "reverse":
        target_ids, given_ids = target_ids[::-1], given_ids[::-1]
    ids = torch.tensor([[0, *given_ids, *target_ids]])
    with torch.no_grad():
        logprobs = lm.model(ids).logits[0].double().log_softmax(-1)
    scores = [logprobs[t - 1, ids[0, t]].item() for t in range(1 + len(given_ids), ids.shape[1])]
    return scores[::-1] if lm.direction == "reverse" else scores


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return random_pairs(english_documents(), 500)


@pytest.fixture(scope="module")
def expected(lm: DirectedLM, pairs: list[tuple[str, str]]) -> list[list[float]]:
    return [naive_logprobs(lm, *pair) for pair in pairs]


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 100, 700, 2048, 16384])
def test_scores_equal_the_naive_computation(
    lm: DirectedLM, pairs: list[tuple[str, str]], expected: list[list[float]], batch_tokens: int, is_shuffled: bool
) -> None:
    assert lm._scorer.plain_head
    assert lm._scorer.shares
    order = random.Random(1).sample(range(len(pairs)), len(pairs)) if is_shuffled else list(range(len(pairs)))
    scores = lm.logprobs([pairs[i] for i in order], batch_tokens=batch_tokens)
    for score, index in zip(scores, order, strict=True):
        # At -10.8 nats 1.09e-5 were seen on an AMD EPYC: eleven units in the last place of fp32.
        assert score.token_logprobs == pytest.approx(expected[index], abs=TOKEN_TOLERANCE, rel=3e-6)
        assert score.logprob == pytest.approx(sum(expected[index]), rel=TOTAL_TOLERANCE)
        assert score.num_tokens == len(expected[index])


@pytest.mark.parametrize("batch_tokens", [1, 150, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_candidates_have_in_common_is_read_once_and_changes_nothing(
    lm: DirectedLM, dtype: torch.dtype, batch_tokens: int
) -> None:
    """Options of one to many tokens beside a long text that all are conditioned on, among others."""
    text = english_documents()[5]
    given = [text[:500], text[600:640]]
    options = [" yes", " no", text[700:760], "", text[800:1000], text[810:900]]
    asked = [(option, given[0]) for option in options if option] + [(options[2], given[1]), (given[1], given[0])]
    model = lm if dtype is torch.float32 else type(lm).load(lm.record.folder, device="cpu", dtype=dtype)
    layouts = [model.arrange(*pair) for pair in asked]
    groups, rest = find_groups(layouts)
    assert [len(group) for group in groups] == [6]
    assert len(rest) == 1
    absolute, relative = (TOKEN_TOLERANCE, 3e-6) if dtype is torch.float32 else (1e-10, 0)
    for score, pair in zip(model.score(layouts, batch_tokens=batch_tokens), asked, strict=True):
        # Keys behind a copied prefix are added up in another order: at -9 nats 1.4e-5 were seen, in float64 nothing.
        assert score.token_logprobs == pytest.approx(naive_logprobs(model, *pair), abs=absolute, rel=relative)


def test_small_chunks_of_the_head_change_nothing(
    lm: DirectedLM, pairs: list[tuple[str, str]], expected: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 3 * 1024 + 5)  # three rows at a time
    for score, values in zip(lm.logprobs(pairs[:10]), expected, strict=False):
        assert score.logprob == pytest.approx(sum(values), rel=TOTAL_TOLERANCE)


def test_repeated_pairs_are_read_once_and_get_equal_scores(lm: DirectedLM, pairs: list[tuple[str, str]]) -> None:
    layouts = [lm.arrange(*pair) for pair in [*pairs[:4], *pairs[:4], pairs[0]]]
    settled: list[int] = []
    scores = lm.score(layouts, batch_tokens=1, on_batch=settled.append)
    assert scores[:4] == scores[4:8]
    assert scores[8] == scores[0]
    assert sorted(settled) == [2, 2, 2, 3]


def test_the_same_ids_with_another_target_are_another_question(lm: DirectedLM) -> None:
    ids = lm.encode("The expression is evaluated before the statement")
    near, far = (ids[3:], ids[:3]) if lm.direction == "reverse" else (ids[:3], ids[3:])
    part, whole = condition(far, near, lm.direction, boundary_id=0), condition(ids, [], lm.direction, boundary_id=0)
    assert part.ids == whole.ids
    together = lm.score([part, whole])
    assert [s.num_tokens for s in together] == [len(far), len(ids)]
    assert together[0].logprob == pytest.approx(lm.score([part])[0].logprob, rel=TOTAL_TOLERANCE)


def test_one_pair_and_a_batch_agree(lm: DirectedLM, pairs: list[tuple[str, str]]) -> None:
    one = lm.logprob(*pairs[3])
    assert one.logprob == pytest.approx(lm.logprobs(pairs)[3].logprob, rel=TOTAL_TOLERANCE)


@pytest.mark.parametrize("batch_tokens", [1, 700, 4096])
def test_in_float64_the_batched_path_is_exact(lm: DirectedLM, pairs: list[tuple[str, str]], batch_tokens: int) -> None:
    pairs = pairs[:50]
    exact = type(lm).load(lm.record.folder, device="cpu", dtype=torch.float64)
    for score, pair in zip(exact.logprobs(pairs, batch_tokens=batch_tokens), pairs, strict=True):
        assert score.logprob == pytest.approx(sum(naive_logprobs(exact, *pair)), abs=1e-9, rel=0)


def test_a_document_split_anywhere_sums_to_its_whole(lm: DirectedLM) -> None:
    ids = lm.encode(english_documents()[5])[:60]
    whole = lm.score([condition(ids, [], lm.direction, boundary_id=0)])[0].logprob
    for cut in range(1, len(ids)):
        near, far = (ids[cut:], ids[:cut]) if lm.direction == "reverse" else (ids[:cut], ids[cut:])
        layouts = [
            condition(near, [], lm.direction, boundary_id=0),
            condition(far, near, lm.direction, boundary_id=0),
        ]
        assert sum(s.logprob for s in lm.score(layouts)) == pytest.approx(whole, rel=TOTAL_TOLERANCE)


def test_chain_rule_over_texts(lm: DirectedLM) -> None:
    a, b, c = "The expression", " is evaluated", " before the statement"  # byte-level BPE never merges before a space
    assert lm.encode(a + b + c) == lm.encode(a) + lm.encode(b) + lm.encode(c)
    if lm.direction == "reverse":
        parts, whole = [(a, b + c), (b, c)], (a + b, c)
    else:
        parts, whole = [(b, a), (c, a + b)], (b + c, a)
    total = sum(lm.logprob(target, given).logprob for target, given in parts)
    assert total == pytest.approx(lm.logprob(*whole).logprob, rel=TOTAL_TOLERANCE)


def test_closed_scores_the_boundary_too(lm: DirectedLM) -> None:
    open_score = lm.logprob("The expression", " is evaluated")
    closed = lm.logprob("The expression", " is evaluated", closed=True)
    assert closed.num_tokens == open_score.num_tokens + 1
    at = 0 if lm.direction == "reverse" else -1  # the boundary lies before the text in a reverse model
    boundary = closed.token_logprobs[at]
    assert closed.logprob - boundary == pytest.approx(open_score.logprob, rel=TOTAL_TOLERANCE)
    assert boundary < 0


def test_texts_that_just_fit_are_scored_and_longer_ones_are_refused(lm: DirectedLM) -> None:
    ids = lm.encode(english_documents()[5])
    fitting = ids[:CONTEXT_TOKENS]  # the last id of a sequence is only predicted, the boundary is read
    text = lm.decode(fitting)
    assert len(lm.encode(text)) == CONTEXT_TOKENS
    assert lm.logprob(text, "").num_tokens == CONTEXT_TOKENS
    with pytest.raises(InputError, match=r"pair 1: 257 tokens with the boundary, but .* at most 256"):
        lm.logprobs([("a", "b"), (text, " x")])


def test_longer_texts_are_read_in_windows_when_asked(lm: DirectedLM) -> None:
    """Each token is conditioned on the ids of the first window that reaches it; here one pass a token."""
    text = english_documents()[5][:2500]
    target, given = (text[:700], text[700:]) if lm.direction == "reverse" else (text[-700:], text[:-700])
    with pytest.raises(InputError, match="at most 256"):
        lm.logprob(target, given)
    score = lm.logprob(target, given, windowed=True)
    target_ids, given_ids = lm.encode(target), lm.encode(given)
    if lm.direction == "reverse":
        target_ids, given_ids = target_ids[::-1], given_ids[::-1]
    ids = [0, *given_ids, *target_ids]
    begin, values = 0, []
    for t in range(1 + len(given_ids), len(ids)):
        while t > begin + CONTEXT_TOKENS:
            begin += CONTEXT_TOKENS // 2
        logits = lm.model(torch.tensor([ids[begin:t]])).logits[0, -1].detach().double()
        values.append(float(logits.log_softmax(-1)[ids[t]]))
    assert score.num_windows > 1
    found = score.token_logprobs[::-1] if lm.direction == "reverse" else score.token_logprobs
    assert found == pytest.approx(values, abs=TOKEN_TOLERANCE, rel=0)


def test_what_is_written_without_chance_is_known_as_such(lm: DirectedLM) -> None:
    ids = [0, *lm.encode("before")]
    for _ in range(6):
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 1024]
    found = lm.score([ConditionedIds(each, len(ids) - 6) for each in (ids, other)])
    assert [score.is_greedy for score in found] == [True, False]


def test_an_empty_text_cannot_be_scored(lm: DirectedLM) -> None:
    with pytest.raises(InputError, match="no token"):
        lm.logprob("", "given")


def test_models_that_scale_their_logits_are_scored_through_their_own_forward(
    tokenizer_folder: Path, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.25,
        logits_scaling=4.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    lm = ForwardLM.load(save_model(GraniteForCausalLM, config, tmp_path, tokenizer_folder, None), device="cpu")
    assert not lm._scorer.plain_head
    for score, pair in zip(lm.logprobs(pairs[:10], batch_tokens=700), pairs, strict=False):
        assert score.token_logprobs == pytest.approx(naive_logprobs(lm, *pair), abs=TOKEN_TOLERANCE, rel=0)


@pytest.mark.parametrize("batch_tokens", [1, 10, 64, 10_000])
def test_batches_hold_every_sequence_once_within_the_budget(batch_tokens: int) -> None:
    lengths = [random.Random(3).randint(1, 60) for _ in range(100)]
    batches = list(scoring.build_batches(lengths, batch_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
