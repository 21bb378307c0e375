"""The loss of a document, its windows, and the comparison of both directions on the same tokens."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from random_models import edit_config, save_random_model

from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError, TokenizerMismatchError, UsageError
from megatron_ledom.evaluation.loss import compare_losses, cut_windows, document_loss
from megatron_ledom.evaluation.table import describe_comparison, format_table
from megatron_ledom.evaluation.unigram import count_tokens
from megatron_ledom.inference import load_lm
from megatron_ledom.testing import english_documents, write_jsonl

TEXTS = [d[:700] for d in english_documents()[:5]] + ["Short.", "\u00e9t\u00e9"]


@pytest.fixture(scope="module")
def folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save_random_model(root / name, tokenizer_folder, name) for name in ("reverse", "forward")]


@pytest.fixture(scope="module")
def dataset(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("data")
    source = write_jsonl(root / "train.jsonl", [d[:2000] for d in english_documents()[10:20]])
    preprocess(
        PreprocessConfig(
            inputs=[source],
            output_prefix=str(root / "train"),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_folder),
            append_eod=True,
        )
    )
    return str(root / "train_text_document")


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3), (64, 32)])
def test_windows_score_every_id_once_with_enough_before_it(context: int, stride: int) -> None:
    for length in range(2, 40):
        ids = list(range(length))
        windows = list(cut_windows(ids, context, stride))
        scored = [i for w in windows for i in w.ids[w.target_start :]]
        assert scored == ids[1:]
        for number, window in enumerate(windows):
            assert len(window.ids) - 1 <= context
            assert window.target_start >= (1 if number == 0 else context - stride + 1)


@pytest.mark.parametrize("index", [0, 1])
def test_the_loss_of_short_documents_is_one_plain_pass(folders: list[Path], index: int) -> None:
    lm = load_lm(folders[index], device="cpu")
    text = TEXTS[0][:300]
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    ordered = torch.tensor([[0, *(ids[::-1] if lm.direction == "reverse" else ids), 0]])
    with torch.no_grad():
        logprobs = lm.model(ordered[:, :-1]).logits[0].double().log_softmax(-1)
    expected = -logprobs.gather(1, ordered[0, 1:, None]).sum().item()
    loss = document_loss(lm, [text], context_tokens=256, stride_tokens=128)
    assert loss.nll == pytest.approx(expected, abs=1e-4)
    assert loss.num_tokens == len(ids) + 1
    assert loss.per_token == pytest.approx(expected / (len(ids) + 1), abs=1e-6)
    assert loss.bits_per_byte == pytest.approx(expected / math.log(2) / len(text.encode()), abs=1e-6)
    opened = document_loss(lm, [text], context_tokens=256, stride_tokens=128, closed=False)
    assert opened.nll == pytest.approx(expected + logprobs[-1, 0].item(), abs=1e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_long_documents_are_read_in_overlapping_windows(folders: list[Path], index: int) -> None:
    lm = load_lm(folders[index], device="cpu")
    ids = lm.encode(TEXTS[1])
    ordered = [0, *(ids[::-1] if lm.direction == "reverse" else ids), 0]
    context, stride = 50, 20
    expected, position = 0.0, 1
    while position < len(ordered):
        # the window that first reaches `position`
        number = max(0, math.ceil((position - context) / stride))
        begin = number * stride
        seen = torch.tensor([ordered[begin:position]])
        with torch.no_grad():
            expected -= lm.model(seen).logits[0, -1].double().log_softmax(-1)[ordered[position]].item()
        position += 1
    loss = document_loss(lm, [TEXTS[1]], context_tokens=context, stride_tokens=stride)
    assert loss.num_tokens == len(ids) + 1 > 2 * context
    assert loss.nll == pytest.approx(expected, abs=1e-3)


def test_documents_without_a_token_are_passed_over(folders: list[Path]) -> None:
    lm = load_lm(folders[0], device="cpu")
    with_empty = document_loss(lm, ["", *TEXTS, ""], context_tokens=256, stride_tokens=128)
    assert with_empty.nll == pytest.approx(
        document_loss(lm, TEXTS, context_tokens=256, stride_tokens=128).nll, abs=1e-3
    )
    with pytest.raises(InputError, match="no document has a token"):
        document_loss(lm, [""], context_tokens=256, stride_tokens=128)


def test_the_unigram_model_counts_what_is_on_disk(dataset: str, tokenizer_folder: Path, folders: list[Path]) -> None:
    lm = load_lm(folders[0], device="cpu")
    unigram = count_tokens(dataset)
    counts = Counter(i for d in english_documents()[10:20] for i in [*lm.encode(d[:2000]), 0])
    assert unigram.counts.sum() == sum(counts.values())
    assert {i: int(n) for i, n in enumerate(unigram.counts) if n} == dict(counts)
    ids = [*lm.encode(TEXTS[0]), 0]
    total = sum(counts.values()) + 1024
    expected = -sum(math.log((counts[i] + 1) / total) for i in ids)
    assert unigram.total_nll([ids]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="outside the 1024 ids"):
        unigram.total_nll([[1024]])


def test_damaged_training_data_is_refused(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.manifest\.json"):
        count_tokens(tmp_path / "absent")
    manifest = Path(f"{dataset}.manifest.json").read_text()
    (tmp_path / "copy.manifest.json").write_text(manifest)
    (tmp_path / "copy.bin").write_bytes(Path(f"{dataset}.bin").read_bytes()[:-2])
    with pytest.raises(InputError, match=r"copy\.bin has \d+ bytes, its manifest says"):
        count_tokens(tmp_path / "copy")


def test_both_directions_stand_side_by_side_on_the_same_tokens(folders: list[Path], dataset: str) -> None:
    comparison = compare_losses(folders, TEXTS, unigram=count_tokens(dataset), device="cpu")
    (_, first, reverse), (_, second, forward) = comparison.rows
    assert (first, second) == (Direction.REVERSE, Direction.FORWARD)
    assert comparison.unigram is not None
    assert reverse.num_tokens == forward.num_tokens == comparison.unigram.num_tokens
    assert (comparison.context_tokens, comparison.stride_tokens, comparison.num_documents) == (256, 128, 7)
    assert 3 < comparison.unigram.per_token < math.log(1024) < forward.per_token  # random weights know less
    table = format_table(comparison).splitlines()
    assert len({len(line) for line in table}) == 1
    assert "reverse" in table[2]
    assert f"{forward.per_token:.4f}" in table[3]
    assert f"{comparison.unigram.per_token:.4f}" in table[3]
    described = json.loads(json.dumps(describe_comparison(comparison)))
    assert described["models"][0]["loss_per_token"] == reverse.per_token
    assert described["unigram"]["num_tokens"] == forward.num_tokens


def test_without_training_data_there_is_no_yardstick(folders: list[Path]) -> None:
    comparison = compare_losses(folders[:1], TEXTS[-2:], device="cpu")
    assert comparison.unigram is None
    assert describe_comparison(comparison)["unigram"] is None
    assert " - " in format_table(comparison)


def test_other_tokens_cannot_stand_side_by_side(
    folders: list[Path], dataset: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    from megatron_ledom.testing import train_bpe_tokenizer

    other_tokenizer = train_bpe_tokenizer(TEXTS, 300, tmp_path / "tokenizer")
    other = save_random_model(tmp_path / "other", other_tokenizer, "forward")
    with pytest.raises(TokenizerMismatchError, match="document 1 has other tokens"):
        compare_losses([folders[0], other], TEXTS, device="cpu")
    edit_config(other, ledom={"direction": "forward", "tokenizer_fingerprint": "sha256:0"})
    with pytest.raises(TokenizerMismatchError, match=r"sha256:0 .*ledom\.tokenizer_fingerprint"):
        compare_losses([other], TEXTS, unigram=count_tokens(dataset), device="cpu")


def test_contexts_and_strides_that_cannot_work_are_refused(folders: list[Path]) -> None:
    with pytest.raises(UsageError, match="--context is 257, it must be 1 or at most 256"):
        compare_losses(folders, TEXTS, context_tokens=257, device="cpu")
    with pytest.raises(UsageError, match="--stride is 65"):
        compare_losses(folders, TEXTS, context_tokens=64, stride_tokens=65, device="cpu")
