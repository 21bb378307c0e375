"""The golden dataset: its bytes, and that the drawings in docs/ show it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.direction import Direction, flip, stored_document
from megatron_ledom.testing import REPOSITORY

GOLDEN = Path(__file__).parent.parent / "golden"
SEQUENCE_LENGTH = 6


@pytest.fixture
def made(tmp_path: Path, tokenizer_folder: Path) -> Path:
    preprocess(
        PreprocessConfig(
            inputs=[GOLDEN / "tiny.jsonl"],
            output_prefix=str(tmp_path / "tiny"),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tokenizer_folder),
            append_eod=True,
        )
    )
    return tmp_path / "tiny_text_document"


def test_the_bytes_are_the_golden_ones(made: Path) -> None:
    for suffix in ("bin", "idx", "crc32", "skipped.jsonl"):
        assert Path(f"{made}.{suffix}").read_bytes() == (GOLDEN / f"{made.name}.{suffix}").read_bytes()


def test_the_manifest_is_the_golden_one_but_for_time_place_and_version(made: Path) -> None:
    found, golden = (json.loads(Path(f"{p}.manifest.json").read_text()) for p in (made, GOLDEN / made.name))
    for manifest in (found, golden):
        manifest["tokenizer"]["model"] = Path(manifest["tokenizer"]["model"]).name
        manifest["sources"][0]["path"] = Path(manifest["sources"][0]["path"]).name
        del manifest["created_utc"], manifest["megatron_ledom_version"]
        assert manifest.pop("manifest_sha256")
    assert found == golden
    assert list(found) == list(golden)


def test_every_manifest_field_is_described() -> None:
    text = (REPOSITORY / "docs" / "data_format.md").read_text(encoding="utf-8")
    golden = json.loads((GOLDEN / "tiny_text_document.manifest.json").read_text())
    for name, value in golden.items():
        assert f"`{name}`" in text or any(f"`{name}.{part}`" in text for part in value), name
    for name in golden["counts"]:
        assert f"`counts.{name}`" in text


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_the_hex_dump_in_the_docs_shows_the_golden_bytes(suffix: str) -> None:
    text = (REPOSITORY / "docs" / "data_format.md").read_text(encoding="utf-8")
    dump = text.split(f"tiny_text_document.{suffix}\n")[1]
    lines = re.match(r"(?:[0-9a-f]{8}: .*\n)+", dump)
    assert lines is not None
    shown = "".join(line[10:49].replace(" ", "") for line in lines.group().splitlines())
    assert bytes.fromhex(shown) == (GOLDEN / f"tiny_text_document.{suffix}").read_bytes()


def row(name: str) -> list[int]:
    """Return the ids that docs/direction.md draws behind `name`, E being the end-of-document id 0."""
    text = (REPOSITORY / "docs" / "direction.md").read_text(encoding="utf-8")
    found = re.search(rf"^{name}((?: +(?:\d+|E)(?=\s))+)", text, flags=re.MULTILINE)
    assert found is not None, name
    return [0 if word == "E" else int(word) for word in found.group(1).split()]


def test_the_ids_in_the_docs_are_those_of_the_tokenizer(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    natural = tokenizer.encode("Once upon a time")
    assert row("natural") == natural.tolist()
    assert row("reversed") == flip(natural).tolist()
    assert row("forward file") == stored_document(natural, Direction.FORWARD, 0).tolist()
    assert row("reverse file") == stored_document(natural, Direction.REVERSE, 0).tolist()
    given = tokenizer.encode(" a time")
    assert row("model in") == [0, *flip(given).tolist()]
    assert [*row("model in")[1:], *row("model out")] == row("reverse file")
    golden = np.fromfile(GOLDEN / "tiny_text_document.bin", dtype=np.uint16)
    assert row("stream") == golden.tolist()


def gpt_samples(prefix: Path, *, reset: bool) -> Any:
    """Megatron's own GPTDataset over the golden file."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE_LENGTH,
        split="1,0,0",
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=1024, unique_identifiers={}),
        reset_position_ids=reset,
        reset_attention_mask=reset,
        eod_mask_loss=False,
        create_attention_mask=True,
    )
    return GPTDataset(IndexedDataset(str(prefix)), str(prefix), np.arange(2, dtype=np.int32), 3, Split.train, config)


def test_the_samples_in_the_docs_are_what_megatrons_dataset_returns() -> None:
    dataset = gpt_samples(GOLDEN / "tiny_text_document", reset=False)
    assert dataset.document_index.tolist() == [0, 1]  # this seed leaves the documents in order
    samples = {int(place): dataset[i] for i, place in enumerate(dataset.shuffle_index)}
    text = (REPOSITORY / "docs" / "direction.md").read_text(encoding="utf-8")
    drawn = re.findall(r"sample \d   tokens ([ \d]+)\n +labels ([ \d]+\d)", text)
    assert len(drawn) == 3
    for place, (tokens, labels) in enumerate(drawn):
        assert samples[place]["tokens"].tolist() == [int(i) for i in tokens.split()]
        assert samples[place]["labels"].tolist() == [int(i) for i in labels.split()]


def test_the_reset_mask_in_the_docs_is_what_megatrons_dataset_returns() -> None:
    dataset = gpt_samples(GOLDEN / "tiny_text_document", reset=True)
    (sample,) = (dataset[i] for i, place in enumerate(dataset.shuffle_index) if place == 1)
    assert sample["position_ids"].tolist() == row("           positions")
    text = (REPOSITORY / "docs" / "direction.md").read_text(encoding="utf-8")
    drawn = re.search(r"sees((?: +(?:\d+|E|\.)){6}).*\n((?: +(?:(?:\d+|E|\.) *){6}\n){5})", text)
    assert drawn is not None
    rows = [line.split() for line in [drawn.group(1), *drawn.group(2).splitlines()]]
    sees = [[word != "." for word in words] for words in rows]
    assert sees == (~sample["attention_mask"][0]).tolist()
