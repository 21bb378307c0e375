"""Step-level beam search: solutions grown step by step, the best few kept by Reverse Reward.

    beams      the partial solutions kept so far, at first the empty one
    a round    every unfinished beam is continued `expansions` times by the forward model, one step each;
               all children, and the beams that are finished, are scored by the reward of what is there so far,
               and the best `num_beams` of them are the next beams
    the end    no beam can grow (each is finished, or at the end of the context), or `max_steps` rounds are over

The paper has 4 beams and 3 expansions; where its steps end is not published (`steps.py` holds the choices). The score
is `best_of_n.py`'s, so that a partial solution counts exactly as the same text would among N candidates. The search
of one question does not depend on the others but for the random draws, which a block of questions shares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.inference.files import check_output, open_output
from megatron_ledom.inference.folder import check_direction, load_record
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.log import Progress
from megatron_ledom.rerank.best_of_n import RankedCandidate, RerankSettings, rank_questions
from megatron_ledom.rerank.candidates import Candidate, Question, read_unanswered
from megatron_ledom.rerank.reward import check_reverse_weight
from megatron_ledom.rerank.steps import FindEnd

if TYPE_CHECKING:  # torch comes with it
    from megatron_ledom.inference.model import ForwardLM, ReverseLM

QUESTIONS_PER_BLOCK = 32  # searched side by side, so that the models see full batches


@dataclass(frozen=True)
class BeamSettings:
    """What decides a search.

    Attributes:
        reward: lambda, normalisation, separator, models.
        sampling: of a step: temperature, longest step, seed; the number of samples is `expansions`.
        step: how steps are cut, for the record.
        num_beams: partial solutions kept.
        expansions: continuations of each in a round.
        max_steps: most rounds.
    """

    reward: RerankSettings
    sampling: Sampling
    step: str
    num_beams: int = 4
    expansions: int = 3
    max_steps: int = 16

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: a number below 1, or no forward model.
        """
        for flag, value in (("beams", self.num_beams), ("expansions", self.expansions), ("max-steps", self.max_steps)):
            if value < 1:
                raise UsageError(f"--{flag} is {value}, it must be 1 or more")
        if self.reward.forward_model is None:
            raise UsageError("--forward-model is needed: it writes the steps")

    def describe(self) -> dict[str, Any]:
        """The settings as they are written beside every result."""
        s = self.sampling
        return {
            **self.reward.describe(),
            "num_beams": self.num_beams,
            "expansions": self.expansions,
            "step": self.step,
            "max_steps": self.max_steps,
            "step_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "seed": s.seed,
        }


@dataclass
class Node:
    """A partial solution in the tree of one question.

    Attributes:
        number: place in the tree, from 0; the root (nothing written) has none.
        parent: number of the partial solution that it continues, None for the root's children.
        depth: the round in which it was written, from 1.
        step: what this round wrote.
        text: the whole partial solution.
        finished: the model ended the document after it.
        stopped: not finished, and another step does not fit into the context of one of the models.
        kept: it was among the beams after the round that wrote it.
        score: its reward and what that is made of.
    """

    number: int
    parent: int | None
    depth: int
    step: str
    text: str
    finished: bool
    stopped: bool = False
    kept: bool = False
    score: RankedCandidate | None = None

    def to_record(self) -> dict[str, Any]:
        """The object written for it."""
        assert self.score is not None, self.number
        scores = self.score.to_record(rank=0)
        return {
            "number": self.number,
            "parent": self.parent,
            "depth": self.depth,
            "step": self.step,
            "finished": self.finished,
            "stopped": self.stopped,
            "kept": self.kept,
            **{key: scores[key] for key in ("reward", "forward_logprob", "reverse_logprob")},
        }


@dataclass
class Tree:
    """The search of one question: every partial solution that was scored, and the beams now."""

    question: Question
    nodes: list[Node] = field(default_factory=list)
    beams: list[Node] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether no beam can grow."""
        return bool(self.beams) and not self.growing

    @property
    def growing(self) -> list[Node]:
        """The beams that can be continued."""
        return [beam for beam in self.beams if not beam.finished and not beam.stopped]

    def grow(self, parent: Node | None, depth: int, step: str, finished: bool) -> None:
        """Add a child; one with the text of another child of this round is that child."""
        text = (parent.text if parent else "") + step
        is_double = any(n.text == text and n.finished == finished and n.depth == depth for n in self.nodes)
        if text.strip() and not is_double:
            number = None if parent is None else parent.number
            self.nodes.append(Node(len(self.nodes), number, depth, step, text, finished))

    def to_record(self, settings: BeamSettings) -> dict[str, Any]:
        """The line written for the question: its beams as ranked candidates, and the tree."""
        candidates = []
        for rank, beam in enumerate(self.beams, start=1):
            assert beam.score is not None, beam.number
            scores = beam.score.to_record(rank) | {"index": rank - 1}
            candidates.append({**scores, "finished": beam.finished, "node": beam.number})
        tree = [node.to_record() for node in self.nodes]
        return {**self.question.record, "candidates": candidates, "beam_search": settings.describe(), "tree": tree}


def search(
    questions: Sequence[Question], reverse: ReverseLM, forward: ForwardLM, find_end: FindEnd, settings: BeamSettings
) -> Iterator[Tree]:
    """Search solutions of every question; yields finished trees in the order of the questions.

    Args:
        questions: texts; candidates that they may have are not looked at.
        reverse: scores the question given a partial solution.
        forward: writes steps, and scores partial solutions given the question.
        find_end: where a step ends, see `build_step_end`.
        settings: everything else.

    Raises:
        InputError: question and partial solution are longer than a model's context, or a question for which
            the model writes nothing.
    """
    settings.check()
    progress = Progress("search", len(questions), "questions")
    for start in range(0, len(questions), QUESTIONS_PER_BLOCK):
        trees = [Tree(question) for question in questions[start : start + QUESTIONS_PER_BLOCK]]
        for depth in range(1, settings.max_steps + 1):
            growing = [tree for tree in trees if not tree.is_done]
            if not growing:
                break
            sampling = replace(
                settings.sampling,
                num_samples=settings.expansions,
                seed=settings.sampling.seed + start * settings.max_steps + depth,
            )
            _expand(growing, reverse, forward, find_end, settings.reward.separator, sampling, depth)
            _keep_best(growing, reverse, forward, settings, depth)
        yield from trees
        progress.update(len(trees))
    progress.close()


def check_lengths(
    questions: Sequence[Question], reverse: ReverseLM, forward: ForwardLM, settings: BeamSettings
) -> None:
    """Refuse a question that leaves no room for a step, before the first search.

    Raises:
        InputError: it names the line.
    """
    from megatron_ledom.rerank.sampler import encode_prompts

    prompts = [question.text + settings.reward.separator for question in questions]
    encode_prompts(forward, prompts, settings.sampling, what=lambda index: questions[index].where)
    for q in questions:
        reverse.check_length(1 + len(reverse.encode(q.text)), f"{q.where} and the beginning of a step")


def _expand(
    trees: Sequence[Tree],
    reverse: ReverseLM,
    forward: ForwardLM,
    find_end: FindEnd,
    separator: str,
    sampling: Sampling,
    depth: int,
) -> None:
    """Write one step after every unfinished beam of every tree."""
    from megatron_ledom.rerank.sampler import continue_texts

    def fits_reverse(question: Question, text: str) -> bool:
        """Whether the reverse model can score the question before this partial solution."""
        num_tokens = 1 + len(reverse.encode(question.text)) + len(reverse.encode(separator + text)) - 1
        return reverse.context_tokens is None or num_tokens <= reverse.context_tokens

    places: list[tuple[Tree, Node | None]] = []
    for tree in trees:
        for node in tree.growing:
            prompt = tree.question.text + separator + node.text
            num_tokens = 1 + len(forward.encode(prompt)) + sampling.max_new_tokens
            node.stopped = forward.context_tokens is not None and num_tokens > forward.context_tokens
        places += [(tree, beam) for beam in tree.growing] if tree.beams else [(tree, None)]
    prompts = [tree.question.text + separator + (beam.text if beam else "") for tree, beam in places]
    written = continue_texts(
        forward, prompts, sampling, find_end=find_end, what=lambda i: f"{places[i][0].question.where}, step {depth}"
    )
    for (tree, beam), continuations in zip(places, written, strict=True):
        before = beam.text if beam else ""
        fitting = [c for c in continuations if fits_reverse(tree.question, before + c.text)]
        for continuation in fitting:
            tree.grow(beam, depth, continuation.text, continuation.finished)
        if beam is not None and not fitting:
            beam.stopped = True


def _keep_best(
    trees: Sequence[Tree], reverse: ReverseLM, forward: ForwardLM, settings: BeamSettings, depth: int
) -> None:
    """Score what this round wrote and choose the beams among that and the finished ones."""
    fresh = [[node for node in tree.nodes if node.depth == depth] for tree in trees]
    for tree, nodes in zip(trees, fresh, strict=True):
        if not nodes and not tree.beams:
            raise InputError(
                f"{tree.question.where}: the model writes nothing after this question, or its first step does not fit "
                "into the reverse model's context. Remove the question, or give --step-tokens fewer"
            )
    asked = [
        Question(
            tree.question.text,
            tuple(Candidate(node.text, f"{tree.question.where}, step {depth}") for node in nodes),
            tree.question.where,
            {},
        )
        for tree, nodes in zip(trees, fresh, strict=True)
    ]
    for tree, nodes, ranked in zip(trees, fresh, rank_questions(asked, reverse, forward, settings.reward), strict=True):
        for scored in ranked:
            nodes[scored.index].score = scored
        rivals = [beam for beam in tree.beams if beam.finished or beam.stopped] + nodes
        tree.beams = sorted(rivals, key=_reward, reverse=True)[: settings.num_beams]
        for beam in tree.beams:
            beam.kept = True


def _reward(node: Node) -> float:
    assert node.score is not None, node.number
    return node.score.reward


def format_tree(record: dict[str, Any]) -> str:
    """Draw the tree of one line of the output: a step a line, its reward, `*` where it was kept, `.` where it ends."""
    children: dict[int | None, list[dict[str, Any]]] = {}
    for node in record["tree"]:
        children.setdefault(node["parent"], []).append(node)
    best = record["candidates"][0]["node"]
    lines = []

    def draw(parent: int | None, indent: str) -> None:
        for node in children.get(parent, []):
            mark = "*" if node["kept"] else " "
            end = "  [end]" if node["finished"] else ""
            best_mark = "  <- best" if node["number"] == best else ""
            lines.append(f"{node['reward']:10.3f} {mark} {indent}{node['step'].strip()!r}{end}{best_mark}")
            draw(node["number"], indent + "  ")

    draw(None, "")
    return "\n".join(lines)


def search_file(
    source: Path, output: Path, find_end: FindEnd, settings: BeamSettings, *, overwrite: bool = False
) -> Iterator[dict[str, Any]]:
    """Search solutions of every question of a JSONL file; yields each line after it is written.

    Args:
        source: one object with `question` or `prompt` a line; other fields are kept.
        output: the same lines with the last beams as ranked candidates, and the tree; appears when it is complete.
        find_end: where a step ends.
        settings: everything else.
        overwrite: replace an output that exists.

    Raises:
        InputError, DirectionError, UsageError, OutputExistsError: as in `rerank_file`.
    """
    settings.check()
    check_output(output, overwrite=overwrite)
    questions = read_unanswered(source)
    reward = settings.reward
    check_reverse_weight(reward.reverse_weight)
    check_direction(load_record(reward.reverse_model), Direction.REVERSE, reward.assumed_direction)
    assert reward.forward_model is not None
    check_direction(load_record(reward.forward_model), Direction.FORWARD)
    from megatron_ledom.inference.model import ForwardLM, ReverseLM

    reverse = ReverseLM.load(reward.reverse_model, device=reward.device, assume_direction=reward.assumed_direction)
    forward = ForwardLM.load(reward.forward_model, device=reward.device)
    check_lengths(questions, reverse, forward, settings)
    with open_output(output) as file:
        for tree in search(questions, reverse, forward, find_end, settings):
            record = tree.to_record(settings)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            yield record
