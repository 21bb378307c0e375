"""Where steps end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ledom.data.sentences import train_splitter
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.rerank.steps import FindEnd, build_step_end
from megatron_ledom.testing import english_documents


def cut(text: str, find_end: FindEnd) -> list[str]:
    """All steps of a text, as a model would write it character by character."""
    steps, start = [], 0
    for end in range(1, len(text) + 1):
        found = find_end(text[start:end])
        if found is not None:
            steps.append(text[start : start + found])
            start += found
    return [*steps, text[start:]]


@pytest.mark.parametrize(
    ("kind", "pattern", "text", "steps"),
    [
        ("newline", None, "He has 3.\nSo 4.\n\n#### 4", ["He has 3.\n", "So 4.\n", "\n#### 4"]),
        ("newline", None, "\n\nHe has 3.\n4", ["\n\nHe has 3.\n", "4"]),
        ("sentence", None, "He has 3.5 boxes. Is it 4? No!", ["He has 3.5 boxes.", " Is it 4?", " No!"]),
        ("pattern", r"[;.] ", "3; then 4. Then 5", ["3; ", "then 4. ", "Then 5"]),
        ("pattern", r"\n\n", "a\nb\n\nc", ["a\nb\n\n", "c"]),
    ],
)
def test_steps_end_where_they_should_and_nothing_is_lost(
    kind: str, pattern: str | None, text: str, steps: list[str]
) -> None:
    found = cut(text, build_step_end(kind, pattern=pattern))
    assert found == steps
    assert "".join(found) == text


def test_learnt_parameters_know_abbreviations(tmp_path: Path) -> None:
    learnt = json.loads(train_splitter(english_documents()).parameters)
    learnt["abbrev_types"].append("approx")
    (tmp_path / "punkt.json").write_text(json.dumps(learnt))
    text = "It is approx. 40 boxes long. Then it ends."
    knowing = build_step_end("sentence", punkt=tmp_path / "punkt.json")
    assert cut(text, knowing) == ["It is approx. 40 boxes long.", " Then it ends."]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--step pattern and --step-pattern belong together"):
        build_step_end("pattern")
    with pytest.raises(UsageError, match="belong together"):
        build_step_end("newline", pattern="x")
    with pytest.raises(UsageError, match="not a regular expression"):
        build_step_end("pattern", pattern="(")
    with pytest.raises(UsageError, match="--step word"):
        build_step_end("word")
    with pytest.raises(InputError, match=r"absent.json"):
        build_step_end("sentence", punkt=tmp_path / "absent.json")
