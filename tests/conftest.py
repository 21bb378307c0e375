"""Fixtures shared by every tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from convert_cases import build_cases, train_run

from megatron_ledom.log import get_logger
from megatron_ledom.testing import END_OF_DOCUMENT, english_documents, run_tool, write_jsonl

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture
def log_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], pytest.LogCaptureFixture]]:
    """Given a module's name, what it says from then on; the project's loggers hand nothing up to the root."""
    with ExitStack() as stack:

        def capture(name: str) -> pytest.LogCaptureFixture:
            logger = get_logger(name)  # sets its level, once
            logger.addHandler(caplog.handler)
            stack.callback(logger.removeHandler, caplog.handler)
            return caplog

        yield capture


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


@pytest.fixture(scope="session")
def prefixes(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> dict[str, Path]:
    """The corpus as reversed and as forward binaries: direction -> prefix as `--data-path` wants it."""
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for direction in ("reverse", "forward"):
        done = run_tool(
            "preprocess_data.py",
            *("--input", corpus, "--output-prefix", folder / direction, "--direction", direction),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder, "--append-eod"),
        )
        assert done.returncode == 0, done.stderr
        found[direction] = folder / f"{direction}_text_document"
    return found


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """One Megatron checkpoint per name in `convert_cases.CASES`: a `--save` folder of that name."""
    return build_cases(tmp_path_factory.mktemp("convert") / "cases", tokenizer_folder)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """The run directory of a reverse model trained for four steps at TP 2 x PP 2."""
    return train_run(tmp_path_factory.mktemp("convert_run"), corpus, tokenizer_folder)
