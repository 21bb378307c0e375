"""The worked example of docs/reverse_reward.md: it can be read, and its arithmetic is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_ledom.rerank.best_of_n import RankedCandidate, RerankSettings
from megatron_ledom.rerank.candidates import read_questions
from megatron_ledom.rerank.reward import Normalize, TextLogprob, rank_rewards, reverse_reward
from megatron_ledom.testing import REPOSITORY


def test_the_worked_example_follows_from_the_formula(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "reverse_reward.md").read_text(encoding="utf-8")
    asked, answered = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL))
    (tmp_path / "in.jsonl").write_text(json.dumps(asked) + "\n")
    (question,) = read_questions(tmp_path / "in.jsonl")

    settings = RerankSettings(reverse_model=Path("REV"), forward_model=Path("FWD"))
    assert answered["reverse_reward"] == settings.describe()
    shown = sorted(answered["candidates"], key=lambda c: c["index"])
    ranked = []
    for candidate, values in zip(question.candidates, shown, strict=True):
        forward = TextLogprob(values["forward_logprob"], values["num_forward_tokens"], len(candidate.text))
        reverse = TextLogprob(values["reverse_logprob"], values["num_reverse_tokens"], len(question.text))
        reward = reverse_reward(
            forward, reverse, reverse_weight=settings.reverse_weight, normalize=Normalize(settings.normalize)
        )
        assert reward == pytest.approx(values["reward"], rel=1e-12)
        ranked.append(RankedCandidate(candidate, values["index"], forward, reverse, values["reward"]))
    order = rank_rewards([r.reward for r in ranked])
    assert [ranked[i].to_record(rank) for rank, i in enumerate(order, start=1)] == answered["candidates"]
