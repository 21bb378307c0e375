"""Samples in natural order are the samples of the model's order, turned, with the bounds of their documents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ledom.data.megatron_dataset import DatasetConfig, build_datasets
from megatron_ledom.direction import flip

EOD, NUM_SAMPLES = 0, 6


@pytest.fixture(scope="module")
def reversed_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Short documents of a reversed file, E last in each."""
    prefix = tmp_path_factory.mktemp("natural") / "file"
    builder, rng = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32), np.random.RandomState(2)
    for length in rng.randint(2, 14, size=50).tolist():
        builder.add_document(torch.tensor([*rng.randint(1, 90, size=length), EOD]), [length + 1])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def samples(prefix: str | None, cache: Path, **fields: Any) -> list[dict[str, torch.Tensor]]:
    config = DatasetConfig(
        random_seed=1234,
        sequence_length=24,
        split="100,0,0",
        blend=None if prefix is None else ([prefix], None),
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(unique_identifiers={}, eod=EOD, pad=None, vocab_size=90),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
        create_attention_mask=False,
        **fields,
    )
    train, _, _ = build_datasets(config, (NUM_SAMPLES, 0, 0))
    return [train[i] for i in range(NUM_SAMPLES)]


def test_natural_order_is_the_models_order_turned(reversed_file: str, tmp_path: Path) -> None:
    plain = samples(reversed_file, tmp_path)
    stored = samples(reversed_file, tmp_path, document_bounds=True)
    natural = samples(reversed_file, tmp_path, document_bounds=True, turned_samples=True)
    num_documents = 0
    for before, model_order, turned in zip(plain, stored, natural, strict=True):
        for name, values in before.items():
            assert model_order[name].tolist() == values.tolist()
            assert turned[name].tolist() == flip(values.tolist())
        tokens = turned["tokens"].tolist()
        # The label of a token is the one that precedes it in the text; positions count from the document's end.
        assert turned["labels"][1:].tolist() == tokens[:-1]
        bounds = turned["attention_mask"]
        assert bounds.dtype == torch.int32 and bounds.shape == (2, 24)
        first, last = bounds.tolist()
        assert turned["position_ids"].tolist() == [end - at for at, end in enumerate(last)]
        # E, which closes a document in a reversed file, stands where its text begins.
        begins = {at for at, start in enumerate(first) if start == at}
        assert begins == {0} | {at for at, token in enumerate(tokens) if token == EOD}
        num_documents += len(begins)
        first, last = model_order["attention_mask"].tolist()
        assert model_order["position_ids"].tolist() == [at - start for at, start in enumerate(first)]
    assert num_documents > 2 * NUM_SAMPLES


def test_mock_data_is_turned_too(tmp_path: Path) -> None:
    stored = samples(None, tmp_path)
    natural = samples(None, tmp_path, turned_samples=True)
    assert [s["tokens"].tolist() for s in natural] == [flip(s["tokens"].tolist()) for s in stored]
