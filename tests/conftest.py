"""Fixtures shared by every tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ledom.testing import END_OF_DOCUMENT, english_documents, write_jsonl

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """A byte-level BPE tokenizer of 1,024 entries, trained on the language reference; end of document is id 0."""
    folder = ASSETS / "tokenizer"
    assert END_OF_DOCUMENT in (folder / "tokenizer.json").read_text(encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real English as JSONL: the 79 chapters of the Python language reference."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "reference.jsonl", english_documents())
