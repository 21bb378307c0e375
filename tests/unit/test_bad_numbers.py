"""What counts as a bad step, and what the ledger remembers; whole runs are in tests/distributed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ledom.engine import cpu, update_guard
from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.train.bad_numbers import SKIP, STOP, WINDOW, Ledger, Row, judge
from megatron_ledom.train.drills import parse_faults

NAN = math.nan
CALM = [5.0 + 0.01 * (n % 7) for n in range(WINDOW)]


def table(*rows: tuple[float, float, float, int, int, bool]) -> list[Row]:
    return [Row.of([float(value) for value in row]) for row in rows]


def test_a_row_survives_the_gather() -> None:
    row = Row(1.5, 64.0, 0.25, 3, -1, True)
    assert Row.of([float(value) for value in row.values()]) == row


def test_a_good_step_gives_the_mean_over_all_ranks() -> None:
    # two stages of two data-parallel ranks: the first stage has no loss
    loss, verdict = judge(
        table((0, 0, 0.5, 0, -1, False), (100, 20, 0.5, 0, -1, False), (140, 20, 0.5, 1, -1, False)), [], None
    )
    assert (loss, verdict) == (6.0, None)


@pytest.mark.parametrize(
    ("rows", "cause", "places"),
    [
        ([(100, 20, 1.0, 0, -1, False), (NAN, 20, NAN, 1, 2, True)], "the loss not finite on rank 1", [(1, 2)]),
        ([(100, 20, NAN, 0, -1, True), (99, 20, NAN, 1, -1, False)], "the gradients not finite on rank 0", [(0, None)]),
        (
            [(math.inf, 20, 1.0, 0, 0, False), (NAN, 20, 1.0, 1, 0, False)],
            "the loss not finite on rank 0, 1",
            [(0, 0), (1, 0)],
        ),
        ([(100, 20, math.inf, 0, -1, False)] * 2, "the gradients not finite after the gradients were reduced", []),
        (
            [(100, 20, 1.0, 0, -1, False), (NAN, 20, 1.0, 1, -1, False)],
            "the gradients not finite on rank 1",
            [(1, None)],
        ),
    ],
)
def test_what_is_not_finite_is_placed(
    rows: list[tuple[float, float, float, int, int, bool]], cause: str, places: list[tuple[int, int | None]]
) -> None:
    _, verdict = judge(table(*rows), CALM, None)
    assert verdict is not None and (verdict.cause, verdict.places) == (cause, places)


def test_spikes_are_measured_in_standard_deviations() -> None:
    mean = sum(CALM) / len(CALM)
    spread = math.sqrt(sum((each - mean) ** 2 for each in CALM) / len(CALM))
    for sigmas, is_spike in ((5.9, False), (6.1, True)):
        rows = table(((mean + sigmas * spread) * 20, 20, 1.0, 0, -1, False))
        assert (judge(rows, CALM, 6.0)[1] is not None) is is_spike
        assert judge(rows, CALM, None)[1] is None, "off by default"
        assert judge(rows, CALM[:15], 6.0)[1] is None, "too few losses to compare with"
    below = table((0.1 * 20, 20, 1.0, 0, -1, False))
    assert judge(below, CALM, 6.0)[1] is None, "a loss that falls is no spike"


def entry(step: int, action: str) -> dict[str, object]:
    return {"step": step, "samples": [8, 16], "action": action, "to": None, "cause": "x"}


def test_the_ledger_remembers_and_a_cut_last_line_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad_numbers.jsonl"
    ledger = Ledger(path)
    for step, action in ((3, STOP), (7, SKIP), (7, SKIP), (9, SKIP)):
        ledger.write(entry(step, action))
    read = Ledger.parse(path, path.read_text())
    assert read.entries == ledger.entries and read.num_actions == 2
    path.write_text(path.read_text()[:-20])
    read = Ledger.parse(path, path.read_text())
    assert set(read.entries) == {3, 7}
    read.write(entry(11, SKIP))  # on a line of its own
    with pytest.raises(InputError, match=r"bad_numbers.jsonl:4: no entry of this file"):
        Ledger.parse(path, path.read_text())
    assert "\n" + '{"step": 11' in path.read_text()


@pytest.mark.parametrize("word", ["nan", "nan@", "nan@x", "fire@3", "nan@3:1:2", "nan@-1"])
def test_a_drill_that_means_nothing_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=r"--inject-fault .*: write KIND@STEP"):
        parse_faults([word])


@pytest.fixture
def megatron() -> Iterator[None]:
    """Megatron on the CPU, and its own functions again afterwards."""
    cpu.install()
    yield
    update_guard.restore()
    cpu.restore()


def test_what_an_evaluation_finds_does_not_condemn_the_next_batch(
    megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron.training.training as training
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    rejected: list[str] = []
    machine = RerunStateMachine(mode=RerunMode.DISABLED)  # as Megatron sets it for an evaluation

    def look_at_loss(*_: object, **__: object) -> str:
        machine.validate_result(torch.tensor(NAN), torch.isnan, "found NaN in the loss", fatal=True)
        return "done"

    monkeypatch.setattr(training, "train_step", look_at_loss)
    hooks = SimpleNamespace(reject=rejected.append, may_update=lambda *_: True, after_step=lambda *_: None)
    update_guard.install(hooks)
    with pytest.raises(RuntimeError, match="found NaN in the loss"):
        look_at_loss()  # before any step
    optimizer = SimpleNamespace(prepare_grads=lambda: False)
    assert training.train_step(None, None, None, optimizer, None, iteration=3) == "done"
    assert rejected == ["found NaN in the loss"]
    with pytest.raises(RuntimeError, match="found NaN in the loss"):
        look_at_loss()  # between two steps
    assert len(rejected) == 1
