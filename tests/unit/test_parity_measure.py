"""Distances between models, measured block by block, against the same measured at once; and what a probe holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_ledom.convert.parity_measure import ErrorSum, LogitComparison, LogitFile, RowComparison, Trace
from megatron_ledom.convert.parity_probe import SENTENCES, build_probe
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.direction import Direction, to_natural_order
from megatron_ledom.errors import ParityError

VOCAB_SIZE, PADDED = 50, 64


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [2, 7], found logits [2, 7, 50] and expected ones [2, 7, 64], a little apart."""
    generator = torch.Generator().manual_seed(3)
    expected = 3 * torch.randn(2, 7, PADDED, generator=generator)
    found = expected[..., :VOCAB_SIZE] + 0.01 * torch.randn(2, 7, VOCAB_SIZE, generator=generator)
    return torch.randint(0, VOCAB_SIZE, (2, 7), generator=generator), found, expected


def compared(ids: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, block: int) -> LogitComparison:
    comparison = LogitComparison(ids, VOCAB_SIZE)
    for start in range(0, PADDED, block):
        stop = min(start + block, VOCAB_SIZE)
        comparison.add(start, found[..., start : max(start, stop)], expected[..., start : start + block])
    return comparison


@pytest.mark.parametrize("block", [64, 16, 7, 1])  # 7: a block that is half padding
def test_blocks_give_what_the_whole_gives(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor], block: int) -> None:
    ids, found, expected = logits
    real = expected[..., :VOCAB_SIZE]
    comparison = compared(*logits, block)
    difference = (found - real).abs()
    assert comparison.max_difference == pytest.approx(difference.max().item())
    assert comparison.worst_place is not None
    assert difference[(*comparison.worst_place, comparison.worst_id)] == difference.max()
    assert comparison.relative_difference == pytest.approx((difference.max() / real.abs().max()).item())
    for got, of in zip(comparison.logprobs(), (found, real), strict=True):
        whole = of.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        torch.testing.assert_close(got, whole)
    padding = expected.softmax(-1)[..., VOCAB_SIZE:].sum(-1).mean().item()
    assert comparison.padding_probability() == pytest.approx(padding, rel=1e-5)


def test_without_padding_its_probability_is_zero(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    ids, found, expected = logits
    comparison = LogitComparison(ids, VOCAB_SIZE)
    comparison.add(0, found, expected[..., :VOCAB_SIZE])
    assert comparison.padding_probability() == 0


def test_a_logit_that_is_no_number_is_the_largest_difference(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    ids, found, expected = logits
    found[1, 2, 33] = math.nan
    comparison = compared(ids, found, expected, 16)
    assert comparison.relative_difference == math.inf
    assert (comparison.worst_place, comparison.worst_id) == ((1, 2), 33)


def test_a_file_of_logits_gives_any_range_of_ids_back(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    _, found, _ = logits
    file = LogitFile(tmp_path / "logits.bin", (2, 7))
    for start in range(0, VOCAB_SIZE, 20):
        file.append(found[..., start : start + 20])
    assert torch.equal(file.read(0, VOCAB_SIZE), found)
    assert torch.equal(file.read(17, 43), found[..., 17:43])
    assert file.read(9, 9).shape == (2, 7, 0)


def test_errors_add_up_over_blocks(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    _, found, expected = logits
    error, real = ErrorSum(), expected[..., :VOCAB_SIZE]
    for start in (0, 25):
        error.add(found[..., start : start + 25], real[..., start : start + 25])
    whole = ((found - real).square().mean() / real.square().mean()).sqrt().item()
    assert error.relative == pytest.approx(whole, rel=1e-5)
    error.add(torch.tensor([math.nan]), torch.tensor([1.0]))
    assert not error.relative <= 1


def test_one_changed_row_is_named_whatever_the_blocks() -> None:
    table = torch.randn(VOCAB_SIZE, 24, generator=torch.Generator().manual_seed(4))
    padded, other = torch.cat([table, torch.ones(14, 24)]), table.clone()
    other[31, 5] += 0.1
    same, changed = RowComparison(), RowComparison()
    for comparison, found in ((same, table), (changed, other)):
        comparison.found = [RowComparison.project(rows) for rows in found.split(12)]
        comparison.expected = [RowComparison.project(rows) for rows in padded.split(30)]
    assert same.result(VOCAB_SIZE)[0] < 1e-6
    difference, row = changed.result(VOCAB_SIZE)
    assert row == 31 and difference > 1e-4


def test_the_first_module_that_differs_is_named(tmp_path: Path) -> None:
    torch.manual_seed(6)
    first, second = (torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "abc"}) for _ in range(2))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second["b"].weight[2, 3] += 0.5
    trace, inputs = Trace(tmp_path), torch.randn(2, 5, 8)
    trace.record({f"hf.{name}": module for name, module in first.items()})
    trace.compare({f"megatron.{name}": module for name, module in second.items()})
    for module in first.values():
        module(inputs)
    for module in second.values():
        module(inputs.transpose(0, 1))
    found = trace.first_difference(1e-4)
    assert found is not None and (found["hf"], found["megatron"]) == ("hf.b", "megatron.b")
    assert trace.first_difference(1e3) is None


@pytest.mark.parametrize("direction", list(Direction))
def test_the_probe_holds_sentences_in_the_order_of_the_model(tokenizer_folder: Path, direction: Direction) -> None:
    probe = build_probe(tokenizer_folder, vocab_size=1024, max_length=100, direction=direction)
    assert probe.ids_model.shape == (2, 100)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    assert [span.text for span in probe.spans] == list(SENTENCES[: len(probe.spans)])
    for span in probe.spans[:-1]:  # the last one is cut
        ids = probe.ids_model[0, span.start : span.stop].tolist()
        assert tokenizer.decode(to_natural_order(ids, direction)) == span.text
    assert probe.spans[-1].stop == 100


def test_random_ids_cover_the_vocabulary_and_need_no_tokenizer(tmp_path: Path) -> None:
    probe = build_probe(tmp_path, vocab_size=152_064, max_length=8192, direction=Direction.REVERSE)
    (row,) = probe.ids_model
    assert probe.spans == () and len(row) == 128
    part = 152_064 / 128
    assert sorted(int(i / part) for i in row.tolist()) == list(range(128))
    assert row.max() == 152_063


def test_a_small_vocabulary_is_enough(tmp_path: Path) -> None:
    (row,) = build_probe(tmp_path, vocab_size=3, max_length=16, direction=Direction.FORWARD).ids_model
    assert set(row.tolist()) == {0, 1, 2}


def test_a_tokenizer_that_cannot_be_loaded_leaves_random_ids_and_a_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    probe = build_probe(tmp_path, vocab_size=100, max_length=64, direction=Direction.FORWARD)
    assert probe.ids_model.shape == (1, 64) and probe.spans == ()
    assert probe.why_no_sentences is not None and "cannot load the folder's tokenizer" in probe.why_no_sentences


def test_a_tokenizer_of_another_model_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(ParityError, match=r"gives the id \d+ for plain text; the model has 100 rows"):
        build_probe(tokenizer_folder, vocab_size=100, max_length=64, direction=Direction.FORWARD)
