"""Questions and answers: the ids are those that scoring reads, the loss lies on the wanted part, nothing is cut."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ledom.data.check import check_dataset
from megatron_ledom.data.dataset import check_datasets
from megatron_ledom.data.manifest import PairRecord, load_manifest
from megatron_ledom.data.megatron_dataset import DatasetConfig, build_datasets
from megatron_ledom.data.megatron_pairs import dense_mask, lay_out, pair_bounds
from megatron_ledom.data.pairs import load_question_lengths, pack
from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction, condition, pair_target
from megatron_ledom.errors import DirectionError, InputError, UsageError
from megatron_ledom.train.pairs import check_pairs

SEPARATOR = "\n"
Make = Callable[..., str]


def problem(number: int) -> dict[str, str]:
    return {"question": f"What is {number}{' and' * (number % 7)} {number}?", "answer": f"It is {2 * number}."}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Make:
    def make(
        records: list[Any], name: str = "p", direction: str = "reverse", loss_on: str = "question", **more: Any
    ) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = PreprocessConfig(
            inputs=[path],
            output_prefix=str(tmp_path / name),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_folder),
            json_keys=("question", "answer"),
            pairs=PairRecord("question", "answer", SEPARATOR, loss_on),
            direction=Direction(direction),
            append_eod=True,
            **more,
        )
        preprocess(config)
        return config.prefixes[0]

    return make


def stored_ids(prefix: str) -> list[list[int]]:
    lengths = np.cumsum(
        np.frombuffer(Path(f"{prefix}.idx").read_bytes()[34:], "<i4", load_manifest(prefix).counts.documents)
    )
    return [part.tolist() for part in np.split(np.fromfile(f"{prefix}.bin", np.uint16), lengths)[:-1]]


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stored_pair_is_what_scoring_reads(make: Make, tokenizer: Tokenizer, direction: str, workers: int) -> None:
    problems = [problem(n) for n in range(40)]
    prefix = make(problems, direction=direction, workers=workers, shard_mb=0.001)
    is_reverse = direction == "reverse"
    for pair, stored, num_question in zip(problems, stored_ids(prefix), load_question_lengths(prefix), strict=True):
        target, given = (
            (pair["question"], SEPARATOR + pair["answer"])
            if is_reverse
            else (pair["answer"], pair["question"] + SEPARATOR)
        )
        layout = condition(
            tokenizer.encode(target).tolist(),
            tokenizer.encode(given).tolist(),
            Direction(direction),
            boundary_id=tokenizer.eod_id,
            closed=True,
        )
        assert [tokenizer.eod_id, *stored] == layout.ids
        num_answer = len(stored) - 1 - int(num_question)
        first, beyond = pair_target(
            int(num_question), num_answer, Direction(direction), "question" if is_reverse else "answer"
        )
        assert (first + 1, beyond + 1) == (layout.target_start, len(layout.ids))
    manifest = load_manifest(prefix)
    assert manifest.pairs == PairRecord("question", "answer", SEPARATOR, "question")
    assert manifest.format_version == 3
    assert check_dataset(prefix, tokenizer).faults == []


def test_the_parts_of_a_sample() -> None:
    sample = lay_out([np.array([8, 1, 2, 0]), np.array([9, 3, 0])], [(1, 4), (1, 3)], 9)
    assert sample["tokens"].tolist() == [0, 8, 1, 2, 0, 9, 3, 0, 0]
    assert sample["labels"].tolist() == [8, 1, 2, 0, 9, 3, 0, 0, 0]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 1, 0, 1, 1, 0, 0]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    first, last = pair_bounds([4, 3], 9)
    assert last.tolist() == [3, 3, 3, 3, 6, 6, 6, 8, 8]
    sees = [[int(k) for k in np.flatnonzero(~row)] for row in dense_mask(first)]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], [4, 5], [4, 5, 6], [7], [7, 8]]


@pytest.mark.parametrize(
    ("direction", "loss_on", "expected"),
    [
        ("reverse", "question", (2, 6)),
        ("reverse", "answer", (0, 2)),
        ("reverse", "both", (0, 6)),
        ("forward", "question", (0, 3)),
        ("forward", "answer", (3, 6)),
        ("forward", "both", (0, 6)),
    ],
)
def test_which_ids_are_learnt(direction: str, loss_on: str, expected: tuple[int, int]) -> None:
    assert pair_target(3, 2, Direction(direction), loss_on) == expected


@pytest.mark.parametrize("capacity", [9, 16, 200])
def test_packing_holds_every_document_once_and_little_padding(capacity: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 10, 500)
    samples = pack(lengths, capacity)
    assert sorted(np.concatenate(samples).tolist()) == list(range(500))
    assert max(int(lengths[sample].sum()) for sample in samples) <= capacity
    assert len(samples) <= 1.05 * lengths.sum() / capacity + 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a"}, "p.jsonl:3: no key 'answer' .*--answer-key"),
        ({"question": "a", "answer": " "}, "p.jsonl:3: the value of 'answer' is empty"),
        ({"question": "", "answer": "b"}, "p.jsonl:3: the value of 'question' is empty"),
        ({"question": "a " * 90, "answer": "b"}, r"p.jsonl:3: \d+ ids with the boundary, more than --max-tokens 64"),
        ({"question": 3, "answer": "b"}, "p.jsonl:3: the value of 'question' must be a string"),
    ],
)
def test_what_is_no_pair_is_refused_or_listed(make: Make, record: dict[str, Any], message: str) -> None:
    records = [problem(1), problem(2), record, problem(3)]
    with pytest.raises(InputError, match=message):
        make(records, max_tokens=64)
    prefix = make(records, max_tokens=64, on_bad_record="skip")
    assert load_manifest(prefix).counts.documents == 3
    (listed,) = map(json.loads, Path(f"{prefix}.skipped.jsonl").read_text().splitlines())
    assert listed["row"] == 3
    assert check_dataset(prefix).faults == []


def test_a_damaged_list_of_parts_is_found(make: Make) -> None:
    prefix = make([problem(n) for n in range(5)])
    path = Path(f"{prefix}.pairs")
    counts = np.fromfile(path, "<u4")
    counts[3] = 0
    counts.tofile(path)
    assert any("document 3 is said to have 0 ids" in fault for fault in check_dataset(prefix).faults)
    path.unlink()
    with pytest.raises(InputError, match=r"\.pairs has 0 bytes"):
        check_datasets([prefix], direction=Direction.REVERSE, tokenizer_fingerprint=None)


def test_pairs_are_tokenised_for_one_direction(make: Make) -> None:
    prefix = make([problem(1)])
    with pytest.raises(DirectionError, match=r"preprocess_pairs\.py --direction forward"):
        check_datasets([prefix], direction=Direction.FORWARD, tokenizer_fingerprint=None)


def arguments(**changes: Any) -> argparse.Namespace:
    plain = {"pack_pairs": False, "data_order": None, "data_budget": None, "reset_position_ids": False}
    return argparse.Namespace(**plain | {"reset_attention_mask": False, "eod_mask_loss": False} | changes)


def test_flags_that_do_not_go_with_pairs_are_refused(make: Make, prefixes: dict[str, Path]) -> None:
    prefix, texts = make([problem(1)]), str(prefixes["reverse"])
    found = check_datasets([prefix, texts], direction=Direction.REVERSE, tokenizer_fingerprint=None)
    pairs, plain = {prefix: found[0]}, {texts: found[1]}
    check_pairs(arguments(pack_pairs=True), pairs)
    check_pairs(arguments(data_order="megatron"), plain)
    for datasets, changes, message in (
        (plain, {"pack_pairs": True}, "--pack-pairs: the data holds no pairs"),
        (pairs | plain, {}, "holds pairs and .* texts"),
        (pairs, {"data_order": "megatron"}, "--data-order megatron does not go with pairs"),
        (pairs, {"eod_mask_loss": True}, "--eod-mask-loss does not go with pairs"),
    ):
        with pytest.raises(UsageError, match=message):
            check_pairs(arguments(**changes), datasets)


def build(prefix: str, tokenizer: Tokenizer, num_samples: int, seq_length: int, *, is_packed: bool) -> Any:
    (found,) = check_datasets([prefix], direction=Direction.REVERSE, tokenizer_fingerprint=None)
    assert found.pairs is not None
    config = DatasetConfig(
        random_seed=3,
        sequence_length=seq_length,
        blend=([prefix], None),
        split="100,0,0",
        tokenizer=SimpleNamespace(eod=0, vocab_size=1024, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mmap_bin_files=True,
        pairs={prefix: found.pairs},
        pack_pairs=is_packed,
    )
    return build_datasets(config, (num_samples, 0, 0))[0]


@pytest.mark.parametrize("is_packed", [False, True])
def test_an_epoch_holds_every_pair_once_and_a_longer_run_goes_on(
    make: Make, tokenizer: Tokenizer, is_packed: bool
) -> None:
    prefix = make([problem(n) for n in range(60)], loss_on="answer")
    once = len(pack(np.array([len(ids) for ids in stored_ids(prefix)]), 64)) if is_packed else 60
    assert once < 60 or not is_packed
    short, long = (build(prefix, tokenizer, n * once, 64, is_packed=is_packed) for n in (1, 3))
    learnt = []
    for index in range(once):
        assert all((short[index][key] == long[index][key]).all() for key in ("tokens", "labels", "loss_mask"))
        learnt += short[index]["labels"][short[index]["loss_mask"] > 0].tolist()
    answers = [tokenizer.encode(SEPARATOR + problem(n)["answer"]).tolist() for n in range(60)]
    assert sorted(learnt) == sorted(token for ids in answers for token in ids)
    order = [long[i]["labels"].tolist() for i in range(3 * once)]
    assert sorted(order[:once]) == sorted(order[once : 2 * once])
    assert order[:once] != order[once : 2 * once]
    assert int(long[None]["loss_mask"].sum()) == 0


def test_pairs_longer_than_a_sample_are_refused(make: Make, tokenizer: Tokenizer) -> None:
    prefix = make([problem(1), problem(6)])
    with pytest.raises(InputError, match=r"1 of 2 pairs .* longer than --seq-length 20, the longest has \d+ ids"):
        build(prefix, tokenizer, 4, 20, is_packed=True)
