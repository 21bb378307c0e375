"""Step-level beam search with real models: what is kept is what the reward says, and the tree tells all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.rerank.beam import BeamSettings, Node, Tree, check_lengths, format_tree, search
from megatron_ledom.rerank.best_of_n import RerankSettings
from megatron_ledom.rerank.candidates import Question
from megatron_ledom.rerank.reward import Normalize
from megatron_ledom.rerank.steps import build_step_end

QUESTIONS = [
    Question(text, (), f"q.jsonl, line {n}", {"question": text}) for n, text in enumerate(("The operand is", "A"))
]
FIND_END = build_step_end("pattern", pattern="[aeiou ]")


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReverseLM, ForwardLM]:
    root = tmp_path_factory.mktemp("models")
    reverse = ReverseLM.load(save_random_model(root / "reverse", tokenizer_folder, "reverse", seed=1), device="cpu")
    return reverse, ForwardLM.load(
        save_random_model(root / "forward", tokenizer_folder, "forward", seed=2), device="cpu"
    )


@pytest.fixture(scope="module")
def settings(models: tuple[ReverseLM, ForwardLM]) -> BeamSettings:
    reverse, forward = models
    reward = RerankSettings(
        reverse_model=reverse.record.folder,
        forward_model=forward.record.folder,
        reverse_weight=0.3,
        normalize=Normalize.TOKEN,
        separator="\n",
    )
    return BeamSettings(reward, Sampling(max_new_tokens=8, seed=5), "pattern", num_beams=3, expansions=4, max_steps=4)


@pytest.fixture(scope="module")
def trees(models: tuple[ReverseLM, ForwardLM], settings: BeamSettings) -> list[Tree]:
    return list(search(QUESTIONS, *models, FIND_END, settings))


def reward_of(models: tuple[ReverseLM, ForwardLM], question: str, text: str) -> float:
    answer = models[1].logprob(text, question + "\n")
    asked = models[0].logprob(question, "\n" + text)
    return 0.7 * answer.logprob / answer.num_tokens + 0.3 * asked.logprob / asked.num_tokens


def test_every_node_has_the_reward_of_its_text_and_continues_its_parent(
    models: tuple[ReverseLM, ForwardLM], trees: list[Tree]
) -> None:
    assert [tree.question.text for tree in trees] == [q.text for q in QUESTIONS]
    for tree in trees:
        assert len(tree.nodes) > 12
        for node in tree.nodes:
            assert node.score is not None
            assert node.score.reward == pytest.approx(reward_of(models, tree.question.text, node.text), abs=1e-4)
            before = "" if node.parent is None else tree.nodes[node.parent].text
            assert node.text == before + node.step
            if node.parent is not None:
                assert tree.nodes[node.parent].kept
                assert tree.nodes[node.parent].depth == node.depth - 1


def test_each_round_keeps_the_best_of_its_children_and_of_the_finished(
    trees: list[Tree], settings: BeamSettings
) -> None:
    def reward(node: Node) -> float:
        assert node.score is not None
        return node.score.reward

    for tree in trees:
        beams: list[Node] = []
        for depth in range(1, max(node.depth for node in tree.nodes) + 1):
            rivals = [b for b in beams if b.finished] + [n for n in tree.nodes if n.depth == depth]
            beams = sorted(rivals, key=reward, reverse=True)[: settings.num_beams]
            assert {n.number for n in tree.nodes if n.depth == depth and n.kept} == {
                b.number for b in beams if b.depth == depth
            }
        assert [b.number for b in beams] == [b.number for b in tree.beams]


def test_a_tree_is_written_and_drawn(trees: list[Tree], settings: BeamSettings) -> None:
    record = json.loads(json.dumps(trees[0].to_record(settings)))
    assert [c["rank"] for c in record["candidates"]] == [1, 2, 3]
    best = record["candidates"][0]
    texts = []
    number = best["node"]
    while number is not None:
        texts.append(record["tree"][number]["step"])
        number = record["tree"][number]["parent"]
    assert "".join(reversed(texts)) == best["text"]
    assert record["beam_search"]["expansions"] == 4
    drawn = format_tree(record)
    assert len(drawn.splitlines()) == len(record["tree"])
    assert drawn.count("<- best") == 1
    assert drawn.count(" * ") >= 3


def test_one_beam_and_one_expansion_is_sampling_step_by_step(
    models: tuple[ReverseLM, ForwardLM], settings: BeamSettings
) -> None:
    plain = replace(settings, num_beams=1, expansions=1)
    for tree in search(QUESTIONS, *models, FIND_END, plain):
        assert len(tree.nodes) == tree.nodes[-1].depth
        assert all(node.kept for node in tree.nodes)
        assert tree.beams[0].text == "".join(node.step for node in tree.nodes)


def test_a_beam_at_the_end_of_the_context_stops_and_stays(
    models: tuple[ReverseLM, ForwardLM], settings: BeamSettings
) -> None:
    long = Question("word " * 110, (), "q.jsonl, line 1", {"question": "word"})
    num_tokens = len(models[1].encode(long.text + "\n")) + 1
    sampling = Sampling(max_new_tokens=(256 - num_tokens) // 2, seed=1)
    never = build_step_end("pattern", pattern="\0")
    (tree,) = search([long], *models, never, replace(settings, sampling=sampling, max_steps=9))
    assert any(beam.stopped for beam in tree.beams)
    assert not any(beam.stopped and beam.finished for beam in tree.beams)
    too_long = replace(long, text="word " * 300)
    with pytest.raises(InputError, match=r"q.jsonl, line 1, step 1 and"):
        list(search([too_long], *models, never, settings))


def test_a_beam_that_the_reverse_model_cannot_read_further_stops_and_stays(
    models: tuple[ReverseLM, ForwardLM], settings: BeamSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reverse, forward = models
    question = QUESTIONS[0]
    num_tokens = len(reverse.encode(question.text))
    monkeypatch.setattr(reverse, "context_tokens", num_tokens + 12)
    (tree,) = search([question], *models, build_step_end("pattern", pattern="\0"), replace(settings, max_steps=9))
    assert any(beam.stopped for beam in tree.beams)
    for node in tree.nodes:
        assert num_tokens + len(reverse.encode("\n" + node.text)) <= num_tokens + 12
    monkeypatch.setattr(reverse, "context_tokens", num_tokens)
    with pytest.raises(InputError, match=r"q.jsonl, line 0 and the beginning of a step"):
        check_lengths(QUESTIONS[:1], reverse, forward, settings)


def test_refusals(settings: BeamSettings) -> None:
    for field in ("num_beams", "expansions", "max_steps"):
        with pytest.raises(UsageError, match="must be 1 or more"):
            replace(settings, **{field: 0}).check()
    with pytest.raises(UsageError, match="--forward-model is needed"):
        replace(settings, reward=replace(settings.reward, forward_model=None)).check()
