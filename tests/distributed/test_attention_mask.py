"""`--reset-attention-mask`: no token looks into another document, on every stage of the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import Pretrain

from megatron_ledom.testing import english_documents, run_tool, write_jsonl
from megatron_ledom.train.metrics import TRAIN_LOSS, read_scalars

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
LAST = 4


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Lines of the reference as documents of their own: about four to a sample of 64 tokens."""
    folder = tmp_path_factory.mktemp("short")
    lines = [line for text in english_documents() for line in text.splitlines() if 30 < len(line) < 70]
    done = run_tool(
        "preprocess_data.py",
        *("--input", write_jsonl(folder / "lines.jsonl", lines), "--output-prefix", folder / "lines"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder, "--append-eod"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "lines_text_document"


def test_documents_are_apart_at_one_rank_and_on_middle_stages(
    short_documents: Path, tmp_path: Path, pretrain: Pretrain
) -> None:
    data = ["--data-path", short_documents, "--train-iters", LAST, "--save-interval", 1]
    # Megatron's attention with a dense mask against ours with the bounds of documents, in natural order.
    pretrain(tmp_path / "one", 1, *data, "--reset-attention-mask", "--attention", "megatron")
    start = ["--load", tmp_path / "one" / "checkpoints", "--ckpt-step", 1]
    four = ["--pipeline-model-parallel-size", 4, "--attention", "ledom"]
    pretrain(tmp_path / "stages", 4, *data, *start, "--reset-attention-mask", *four)
    pretrain(tmp_path / "joined", 1, *data, *start)
    apart, stages, joined = (read_scalars(tmp_path / name, TRAIN_LOSS) for name in ("one", "stages", "joined"))
    steps = range(2, LAST + 1)
    assert [stages[step] for step in steps] == pytest.approx([apart[step] for step in steps], rel=TOLERANCE)
    # From the same weights and samples: only what a token may look at differs.
    assert abs(joined[2] / apart[2] - 1) > 10 * TOLERANCE
