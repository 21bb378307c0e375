"""The evaluation over files whose truth is known: what is chosen where, and that every number follows from the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranked_files import write_ranked

from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.rerank.answers import AnswerChecker
from megatron_ledom.rerank.evaluation import EvaluationSettings, build_sizes, evaluate_files
from megatron_ledom.rerank.outcomes import read_outcomes
from megatron_ledom.rerank.report import draw_report, format_markdown
from megatron_ledom.rerank.reward import Normalize

SETTINGS = EvaluationSettings(num_sets=8, num_resamples=1000)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_helpful_reverse_score_is_found_and_a_useless_one_is_not(tmp_path: Path) -> None:
    path = write_ranked(tmp_path / "r.jsonl", 400, 8, seed=1, reverse_skill=2.0)
    report = evaluate_files([path], SETTINGS)
    gain = report["differences"]["8"]["forward likelihood"]["combined"]
    assert gain["low"] > 0.1
    assert report["runs"][0]["chosen"]["8"]["lambda"] >= 0.6
    useless = write_ranked(tmp_path / "u.jsonl", 400, 8, seed=2, reverse_skill=0.0, forward_skill=2.0)
    report = evaluate_files([useless], SETTINGS)
    assert report["runs"][0]["chosen"]["8"]["lambda"] <= 0.4
    gain = report["differences"]["8"]["forward likelihood"]["combined"]
    assert gain["low"] < 0.01


def test_the_numbers_follow_from_the_file(tmp_path: Path) -> None:
    path = write_ranked(tmp_path / "r.jsonl", 300, 6, seed=3, reverse_skill=1.0, forward_skill=1.0)
    report = evaluate_files([path], SETTINGS)
    held_out = read_outcomes(path, AnswerChecker()).is_held_out(SETTINGS.held_out_share)
    assert 30 < held_out.sum() < 90
    test = [line for line, is_out in zip(lines_of(path), held_out, strict=True) if not is_out]
    assert report["num_problems"] == len(test)
    assert report["sizes"] == [1, 2, 4, 6]
    chosen = report["runs"][0]["chosen"]["6"]

    def is_right(line: dict[str, Any], candidate: dict[str, Any]) -> bool:
        return bool(candidate["text"].endswith(f"#### {line['answer']}"))

    def score(candidate: dict[str, Any]) -> float:
        by = {"none": (1, 1), "token": (12, 24), "char": (len(candidate["text"]), 1)}[chosen["normalize"]]
        reverse = candidate["reverse_logprob"] / (by[1] if chosen["normalize"] != "char" else num_chars)
        return float((1 - chosen["lambda"]) * candidate["forward_logprob"] / by[0] + chosen["lambda"] * reverse)

    counts = dict.fromkeys(("greedy", "random", "combined", "oracle", "reverse"), 0.0)
    for line in test:
        num_chars = len(line["question"])
        drawn = [c for c in line["candidates"] if "greedy" not in c]
        counts["combined"] += is_right(line, max(drawn, key=score))
        counts["reverse"] += is_right(line, max(drawn, key=lambda c: c["reverse_logprob"]))
        counts["oracle"] += any(is_right(line, c) for c in drawn)
        counts["random"] += sum(is_right(line, c) for c in drawn) / 6
        counts["greedy"] += sum(is_right(line, c) for c in line["candidates"] if "greedy" in c)
    named = {"random": "random of N", "oracle": "oracle of N", "reverse": "reverse only"}
    for name, count in counts.items():
        found = report["accuracy"]["6"][named.get(name, name)]
        assert found["mean"] == pytest.approx(count / len(test)), name
        assert found["low"] < found["mean"] < found["high"]
    accuracy = report["accuracy"]["6"]
    difference = report["differences"]["6"]["majority vote"]["combined"]["mean"]
    assert difference == pytest.approx(accuracy["combined"]["mean"] - accuracy["majority vote"]["mean"])


def test_lambda_is_chosen_without_the_test_problems(tmp_path: Path) -> None:
    path = write_ranked(tmp_path / "r.jsonl", 300, 4, seed=4, reverse_skill=1.5)
    held_out = read_outcomes(path, AnswerChecker()).is_held_out(SETTINGS.held_out_share)
    before = evaluate_files([path], SETTINGS)["runs"][0]["chosen"]
    lines = lines_of(path)
    for line, is_out in zip(lines, held_out, strict=True):
        if not is_out:  # now the reverse score misleads, on the test problems alone
            for candidate in line["candidates"]:
                candidate["reverse_logprob"] = -80 - candidate["reverse_logprob"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = evaluate_files([path], SETTINGS)
    assert report["runs"][0]["chosen"] == before
    assert report["differences"]["4"]["forward likelihood"]["combined"]["high"] < 0


def test_runs_are_averaged_problem_by_problem(tmp_path: Path) -> None:
    paths = [write_ranked(tmp_path / f"{n}.jsonl", 200, 4, seed=n, reverse_skill=1.0) for n in (1, 2, 3)]
    report = evaluate_files(paths, SETTINGS)
    single = [evaluate_files([path], SETTINGS) for path in paths]
    assert report["num_problems"] == single[0]["num_problems"]
    for name in report["strategies"]:
        by_run = [one["accuracy"]["4"][name]["mean"] for one in single]
        assert report["accuracy"]["4"][name]["mean"] == pytest.approx(np.mean(by_run))
        assert [run[name]["mean"] for run in report["accuracy_by_run"]] == pytest.approx(by_run)
    pooled = report["accuracy"]["4"]["combined"]
    assert (
        pooled["high"] - pooled["low"]
        < single[0]["accuracy"]["4"]["combined"]["high"] - (single[0]["accuracy"]["4"]["combined"]["low"])
    )


def test_a_sample_that_is_missing_is_wrong_and_never_chosen(tmp_path: Path) -> None:
    path = write_ranked(tmp_path / "r.jsonl", 100, 4, seed=5, reverse_skill=1.0)
    lines = lines_of(path)
    drawn = [c for c in lines[7]["candidates"] if "greedy" not in c]
    lines[7]["candidates"] = drawn[:2]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcomes = read_outcomes(path, AnswerChecker())
    assert (outcomes.num_samples, outcomes.num_missing) == (4, 2)
    assert not outcomes.right[7, 2:].any()
    assert (outcomes.groups[7, 2:] == -1).all()
    for normalize in Normalize:
        reward = outcomes.forward[normalize] + outcomes.reverse[normalize]
        assert reward[7, 2:].max() < reward[:, :2].min()
    report = evaluate_files([path], SETTINGS)
    assert "greedy" not in report["strategies"]
    lines[7]["sampled"] = {"greedy": True}  # it was asked for, and came out blank
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_outcomes(path, AnswerChecker()).greedy_right[7] == 0
    text = format_markdown(report)
    assert "No greedy baseline" in text
    assert "count as wrong: 2" in text


def test_without_the_number_of_tokens_nothing_is_divided_by_it(tmp_path: Path) -> None:
    path = write_ranked(tmp_path / "r.jsonl", 100, 4, seed=6, reverse_skill=1.0)
    lines = lines_of(path)
    for line in lines:
        for candidate in line["candidates"]:
            del candidate["num_forward_tokens"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = evaluate_files([path], SETTINGS)
    assert set(report["lambda_curve"][0]) == {"none", "char"}


def test_the_report_is_written_for_people(tmp_path: Path) -> None:
    paths = [write_ranked(tmp_path / f"{n}.jsonl", 100, 4, seed=n, reverse_skill=1.0) for n in (1, 2)]
    report = evaluate_files(paths, SETTINGS)
    text = format_markdown(report)
    for name in report["strategies"]:
        assert f"\n| {name} " in text
    assert "| combined minus forward likelihood |" in text
    assert "run 2" in text
    draw_report(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.pop("answer"), "line 3: no field 'answer' with the gold answer; fields found: 'question'"),
        (lambda line: line.update(answer="yes"), "line 3: field 'answer' is 'yes'"),
        (lambda line: line["candidates"][0].pop("reverse_logprob"), "line 3, candidate 1: reverse_logprob is None"),
        (lambda line: line["candidates"][0].pop("forward_logprob"), "line 3, candidate 1: forward_logprob is None"),
    ],
)
def test_lines_that_cannot_be_evaluated_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = write_ranked(tmp_path / "r.jsonl", 40, 3, seed=1, reverse_skill=1.0)
    lines = lines_of(path)
    change(lines[2])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=message):
        evaluate_files([path], SETTINGS)


def test_too_little_to_evaluate_is_refused(tmp_path: Path) -> None:
    few = write_ranked(tmp_path / "few.jsonl", 20, 3, seed=1, reverse_skill=1.0)
    with pytest.raises(InputError, match="10 each are needed"):
        evaluate_files([few], SETTINGS)
    single = write_ranked(tmp_path / "single.jsonl", 50, 1, seed=1, reverse_skill=1.0)
    with pytest.raises(InputError, match="no question has two samples"):
        evaluate_files([single], SETTINGS)
    with pytest.raises(UsageError, match=r"--held-out-share is 1.5"):
        evaluate_files([few], replace(SETTINGS, held_out_share=1.5))


def test_sizes() -> None:
    assert build_sizes(2) == (1, 2)
    assert build_sizes(64) == (1, 2, 4, 8, 16, 32, 64)
