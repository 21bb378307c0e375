"""What a run reads of its sources: budgets, plans, and how they are written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_order_guard import arguments, write

from megatron_ledom.data.blend import BlendSource, format_plan, plan_blend
from megatron_ledom.data.order import EPOCHS
from megatron_ledom.engine.arguments import build_defaults, build_front_parser
from megatron_ledom.engine.budget import TokenBudget, as_data_path, budget_steps, check_budget, parse_budgets
from megatron_ledom.errors import UsageError
from megatron_ledom.train.datasets import length_from_budget, report_plan, train_sources


def test_budgets_are_read_and_become_weights() -> None:
    budgets = parse_budgets(["284B:data/general", "1.5M:b:c", "700:d"])
    assert budgets == [
        TokenBudget(284 * 10**9, "data/general"),
        TokenBudget(1_500_000, "b:c"),
        TokenBudget(700, "d"),
    ]
    assert as_data_path(budgets) == ["284000000000", "data/general", "1500000", "b:c", "700", "d"]
    assert budget_steps(budgets[2:], seq_length=8, batch_size=4) == 22
    front = build_front_parser().parse_args(["--data-budget", "3K:a", "1K:b"])
    assert build_defaults(front, "cpu", {"data_budget"})["data_path"] == ["3000", "a", "1000", "b"]


@pytest.mark.parametrize("word", ["284B", "B:a", "0:a", "-1:a", "1G:a", "1K:", "a:1K"])
def test_a_budget_of_another_form_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="write TOKENS:PREFIX"):
        parse_budgets([word])
    with pytest.raises(UsageError, match="names a twice"):
        parse_budgets(["1K:a", "2K:a"])


def test_a_run_longer_than_its_budget_is_refused_and_one_that_ends_in_its_last_batch_is_not() -> None:
    budgets = parse_budgets(["900:a", "100:b"])
    check_budget(budgets, num_samples=104, seq_length=10, batch_size=8)
    check_budget(budgets, num_samples=10, seq_length=10, batch_size=8)
    with pytest.raises(UsageError, match=r"reads 1,120 tokens .* allows 1,000: lower its length to 13 steps"):
        check_budget(budgets, num_samples=112, seq_length=10, batch_size=8)


def test_the_budget_sets_the_length_where_no_flag_does(tmp_path: Path) -> None:
    write(tmp_path / "large", [40] * 50)
    budget = {"data_budget": [f"1K:{tmp_path / 'large'}"]}
    args, _ = arguments(tmp_path, "large", **budget)
    assert length_from_budget(args, ["--lr", "1"]) == {"train_iters": 16}  # of 64 tokens
    with pytest.raises(UsageError, match="reads 1,280 tokens"):
        length_from_budget(args, ["--train-iters=20"])
    assert length_from_budget(argparse.Namespace(data_budget=None), []) == {}


def test_the_report_says_tokens_samples_and_epochs(tmp_path: Path, capsys: Any) -> None:
    for name, count in (("large", 50), ("small", 2), ("other", 5)):
        write(tmp_path / name, [40] * count)
    words = [f"960:{tmp_path / 'large'}", f"320:{tmp_path / 'small'}"]
    args, datasets = arguments(tmp_path, "960", "large", "320", "small", data_budget=words, warn_epochs=3.5)
    lines = report_plan(args, datasets, EPOCHS).splitlines()
    assert lines[0] == "data: 1.28K tokens (20 steps of 4 samples, 80 samples of 16)"
    assert lines[2].split() == f"{tmp_path}/large 75.00 % 2K 960 60 0.48 100.0 % of 960".split()
    assert lines[3].split() == f"{tmp_path}/small 25.00 % 80 320 20 4 100.0 % of 320".split()
    assert "small is read 4 times (320 of 80 tokens)" in capsys.readouterr().err


def test_sources_without_weights_are_weighted_by_their_tokens_and_may_be_read_again(tmp_path: Path) -> None:
    for name, count in (("large", 50), ("small", 10), ("other", 20)):
        write(tmp_path / name, [40] * count)
    args, datasets = arguments(tmp_path, "large", "small", "other", train_iters=200, split="50,50,0")
    sources = train_sources(args, datasets, EPOCHS)
    assert [(s.weight, s.num_tokens) for s in sources] == [(2000.0, 1000), (400.0, 200), (800.0, 400)]
    plans = plan_blend(sources, 800, 16)
    assert [p.epochs for p in plans] == pytest.approx([8.0] * 3)


def test_shares_are_what_megatron_draws() -> None:
    from megatron.core.datasets import helpers

    weights, size = [0.61, 0.3, 0.09], 1000
    chosen, within = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(chosen, within, np.array(weights), 3, size, False)
    plans = plan_blend([BlendSource(str(i), w, 1) for i, w in enumerate(weights)], size, 8)
    assert all(abs(plan.samples - count) <= 1 for plan, count in zip(plans, np.bincount(chosen), strict=True))
    assert "of its budget" not in format_plan(plans, num_samples=size, seq_length=8, batch_size=None)
