"""Best of N over real files and models: the scores are the models' own, the order is the reward's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from random_models import random_pairs, save_random_model

from megatron_ledom.errors import DirectionError, InputError, OutputExistsError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.rerank import best_of_n
from megatron_ledom.rerank.best_of_n import RerankSettings, rerank_file
from megatron_ledom.rerank.reward import Normalize
from megatron_ledom.testing import english_documents


@pytest.fixture(scope="module")
def settings(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RerankSettings:
    root = tmp_path_factory.mktemp("models")
    return RerankSettings(
        reverse_model=save_random_model(root / "reverse", tokenizer_folder, "reverse", seed=1),
        forward_model=save_random_model(root / "forward", tokenizer_folder, "forward", seed=2),
        reverse_weight=0.3,
        device="cpu",
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six questions with three to five answers: neighbouring pieces of real text, and pieces from elsewhere."""
    pairs = random_pairs(english_documents(), 30, longest_chars=120)
    pieces = [(x.strip() or "x", y.strip() or "y") for x, y in pairs]
    with (tmp_path / "questions.jsonl").open("w") as file:
        for n in range(6):
            answers: list[Any] = [y for _, y in pieces[n : n + 3 + n % 3]]
            answers[1] = {"text": answers[1], "origin": n}
            file.write(json.dumps({"id": n, "question": pieces[n][0], "candidates": answers}) + "\n")
    return tmp_path / "questions.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("normalize", list(Normalize))
def test_rewards_and_ranks_follow_from_the_models_own_scores(
    settings: RerankSettings, source: Path, tmp_path: Path, normalize: Normalize
) -> None:
    settings = replace(settings, normalize=normalize, separator="\n")
    assert rerank_file(source, tmp_path / "out.jsonl", settings) == (6, 24)
    reverse = ReverseLM.load(settings.reverse_model, device="cpu")
    forward = ForwardLM.load(settings.forward_model or "", device="cpu")
    for asked, answered in zip(read(source), read(tmp_path / "out.jsonl"), strict=True):
        assert (answered["id"], answered["question"]) == (asked["id"], asked["question"])
        assert answered["reverse_reward"]["lambda"] == 0.3
        assert answered["reverse_reward"]["normalize"] == normalize
        ranked = answered["candidates"]
        assert [c["rank"] for c in ranked] == list(range(1, len(asked["candidates"]) + 1))
        assert sorted(c["index"] for c in ranked) == list(range(len(asked["candidates"])))
        for candidate in ranked:
            original = asked["candidates"][candidate["index"]]
            text = original if isinstance(original, str) else original["text"]
            assert candidate["text"] == text
            assert candidate.get("origin") == (None if isinstance(original, str) else original["origin"])
            of_answer = forward.logprob(text, asked["question"] + "\n")
            of_question = reverse.logprob(asked["question"], "\n" + text)
            assert candidate["forward_logprob"] == pytest.approx(of_answer.logprob, rel=1e-6)
            assert candidate["reverse_logprob"] == pytest.approx(of_question.logprob, rel=1e-6)
            assert candidate["num_forward_tokens"] == of_answer.num_tokens
            assert candidate["num_reverse_tokens"] == of_question.num_tokens
            lengths = {
                "none": (1, 1),
                "token": (of_answer.num_tokens, of_question.num_tokens),
                "char": (len(text), len(asked["question"])),
            }[normalize]
            reward = 0.7 * of_answer.logprob / lengths[0] + 0.3 * of_question.logprob / lengths[1]
            assert candidate["reward"] == pytest.approx(reward, rel=1e-6)
        rewards = [c["reward"] for c in ranked]
        assert rewards == sorted(rewards, reverse=True)


def test_lambda_moves_the_order_from_one_model_to_the_other(
    settings: RerankSettings, source: Path, tmp_path: Path
) -> None:
    orders = []
    for weight, key in ((0.0, "forward_logprob"), (1.0, "reverse_logprob")):
        output = tmp_path / f"{weight}.jsonl"
        rerank_file(source, output, replace(settings, reverse_weight=weight))
        for line in read(output):
            values = [c[key] for c in line["candidates"]]
            assert values == sorted(values, reverse=True)
        orders.append([[c["index"] for c in line["candidates"]] for line in read(output)])
    assert orders[0] != orders[1]


def test_carried_scores_stand_in_for_the_forward_model(settings: RerankSettings, source: Path, tmp_path: Path) -> None:
    """A file that was ranked once is ranked again, at another lambda, without the forward model."""
    rerank_file(source, tmp_path / "first.jsonl", settings)
    again = replace(settings, forward_model=None, reverse_weight=0.8, normalize=Normalize.TOKEN)
    rerank_file(tmp_path / "first.jsonl", tmp_path / "again.jsonl", again)
    rerank_file(source, tmp_path / "direct.jsonl", replace(again, forward_model=settings.forward_model))
    for a, b in zip(read(tmp_path / "again.jsonl"), read(tmp_path / "direct.jsonl"), strict=True):
        assert [c["text"] for c in a["candidates"]] == [c["text"] for c in b["candidates"]]
        assert [c["reward"] for c in a["candidates"]] == pytest.approx([c["reward"] for c in b["candidates"]], abs=1e-6)
        assert a["reverse_reward"]["forward_model"] is None


def test_reverse_only_needs_no_forward_score(settings: RerankSettings, source: Path, tmp_path: Path) -> None:
    rerank_file(source, tmp_path / "out.jsonl", replace(settings, forward_model=None, reverse_weight=1.0))
    for line in read(tmp_path / "out.jsonl"):
        assert all(c["forward_logprob"] is None and c["reward"] == c["reverse_logprob"] for c in line["candidates"])


def test_blocks_and_batches_change_nothing(
    settings: RerankSettings, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerank_file(source, tmp_path / "large.jsonl", settings)
    monkeypatch.setattr(best_of_n, "QUESTIONS_PER_BLOCK", 4)
    rerank_file(source, tmp_path / "small.jsonl", replace(settings, batch_tokens=1))
    for a, b in zip(read(tmp_path / "large.jsonl"), read(tmp_path / "small.jsonl"), strict=True):
        assert [c["index"] for c in a["candidates"]] == [c["index"] for c in b["candidates"]]
        assert [c["reward"] for c in a["candidates"]] == pytest.approx([c["reward"] for c in b["candidates"]], abs=1e-5)


def test_equal_candidates_keep_their_order(settings: RerankSettings, tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text(json.dumps({"question": "What?", "candidates": [" same", " other", " same", " same"]}) + "\n")
    rerank_file(source, tmp_path / "out.jsonl", settings)
    (line,) = read(tmp_path / "out.jsonl")
    same = [c["index"] for c in line["candidates"] if c["text"] == " same"]
    assert same == [0, 2, 3]


def test_a_candidate_longer_than_the_context_is_named_and_nothing_is_written(
    settings: RerankSettings, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source.open("a") as file:
        file.write(json.dumps({"question": "Why?", "candidates": ["short", "long " * 400]}) + "\n")
    monkeypatch.setattr(best_of_n, "QUESTIONS_PER_BLOCK", 1)
    monkeypatch.setattr(best_of_n, "rank_questions", lambda *a, **k: pytest.fail("scored before all was looked at"))
    with pytest.raises(InputError, match=r"questions\.jsonl, line 7, candidate 2: \d+ tokens .* at most 256"):
        rerank_file(source, tmp_path / "out.jsonl", settings)
    assert [p.name for p in tmp_path.iterdir()] == ["questions.jsonl"]


def test_models_of_the_wrong_direction_are_refused(settings: RerankSettings, source: Path, tmp_path: Path) -> None:
    forward, reverse = settings.forward_model, settings.reverse_model
    assert forward is not None
    with pytest.raises(DirectionError, match="a reverse model is needed"):
        rerank_file(source, tmp_path / "out.jsonl", replace(settings, reverse_model=forward))
    with pytest.raises(DirectionError, match="a forward model is needed"):
        rerank_file(source, tmp_path / "out.jsonl", replace(settings, forward_model=reverse))


def test_an_output_is_not_overwritten_unless_asked(settings: RerankSettings, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(OutputExistsError):
        rerank_file(source, output, settings)
    assert output.read_text() == "mine\n"
    rerank_file(source, output, settings, overwrite=True)
    assert len(read(output)) == 6
