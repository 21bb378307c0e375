"""tools/pretrain.py refuses what does not fit before anything starts, and keeps Megatron's flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.testing import run_distributed, run_tool, tool_environment, train_bpe_tokenizer

# One process for all refusals: importing Megatron takes longer than all of them together.
DRIVER = """
import contextlib, io, json, sys
from megatron_ledom.errors import LedomError
from megatron_ledom.train import pretrain
from megatron.training import global_vars

answers = {}
for name, argv in json.loads(sys.stdin.read()).items():
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            pretrain.main(argv)
            answers[name] = ["nothing", ""]
        except LedomError as error:
            answers[name] = [type(error).__name__, str(error)]
    global_vars.destroy_global_vars()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def refusals(
    tmp_path_factory: pytest.TempPathFactory, prefixes: dict[str, Path], tokenizer_folder: Path
) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("refusals")
    other_tokenizer = train_bpe_tokenizer(["the cat sat on the mat " * 50], 300, folder / "other")
    (folder / "empty").mkdir()
    base = ["--preset", "tiny", "--device", "cpu", "--run-dir", folder / "run", "--train-iters", 2]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    good = [*base, *tokenizer, tokenizer_folder]
    reverse = ["--data-path", prefixes["reverse"]]
    cases = {
        "wrong tokenizer": [*base, *tokenizer, other_tokenizer, *reverse],
        "two names for data": [*good, *reverse, "--data-budget", f"1M:{prefixes['reverse']}"],
        "less budget than steps": [*good, "--data-budget", f"8K:{prefixes['reverse']}", "--train-iters", 9],
        "missing data": [*good, "--data-path", folder / "nowhere_text_document"],
        "world size": [*good, *reverse, "--tensor-model-parallel-size", 2],
        "no finished checkpoint": [*good, *reverse, "--load", folder / "empty"],
        "Megatron's own refusal": [*good, *reverse, "--hidden-size", 130],
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps({name: [str(word) for word in argv] for name, argv in cases.items()}),
        capture_output=True,
        text=True,
        env=tool_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "run").exists(), "a refused run leaves nothing behind"
    return json.loads(done.stdout.splitlines()[-1])


EXPECTED = {
    "wrong tokenizer": ("TokenizerMismatchError", ["sha256:", "another"]),
    "two names for data": ("UsageError", ["--data-budget takes the place of --data-path"]),
    "less budget than steps": ("UsageError", ["reads 36,864 tokens", "allows 8,000", "to 2 steps"]),
    "missing data": ("InputError", ["nowhere_text_document"]),
    "world size": ("UsageError", ["1 processes do not fit", "--tensor-model-parallel-size 2"]),
    "no finished checkpoint": ("CheckpointError", ["empty"]),
    "Megatron's own refusal": ("UsageError", ["Megatron refuses these arguments"]),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_refused_with_both_facts(case: str, refusals: dict[str, tuple[str, str]]) -> None:
    kind, words = EXPECTED[case]
    found, message = refusals[case]
    assert found == kind, message
    for word in words:
        assert word in message


def test_a_refusal_is_one_line_and_status_2() -> None:
    done = run_tool("pretrain.py", "--preset", "tiny", "--device", "cpu")
    assert done.returncode == 2
    assert "error: --run-dir RUN is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_torchrun_names_the_refusal_as_the_cause() -> None:
    done = run_distributed("pretrain.py", 2, "--preset", "tiny", "--device", "cpu", "--mock-data")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "--run-dir RUN is missing" in line]
    assert [line for line in lines if line.startswith("error: ")] == lines[:1], "one rank speaks for all"
    cause = done.stderr.partition("Root Cause")[2]
    assert "--run-dir RUN is missing" in cause
    assert 'File "' not in cause, "a refusal needs no traceback"


def test_the_data_report_needs_no_ranks_and_leaves_nothing(
    prefixes: dict[str, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    budget = ["--data-budget", f"300B:{prefixes['reverse']}", f"100B:{prefixes['forward']}"]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    flags = ["--preset", "2b", "--tensor-model-parallel-size", 4, "--run-dir", tmp_path / "run", "--data-report-only"]
    done = run_tool("pretrain.py", *flags, *budget, *tokenizer)
    assert done.returncode == 0, done.stderr
    first, _, reverse, forward = done.stdout.splitlines()
    assert first == "data: 400B tokens (95,368 steps of 512 samples, 48,828,416 samples of 8,192)"
    assert "75.00 %" in reverse and "100.0 % of 300B" in reverse and "25.00 %" in forward
    assert "forward documents, read backwards" in done.stderr and "more than --warn-epochs 4" in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_lists_our_flags_and_megatrons_on_request() -> None:
    ours = run_tool("pretrain.py", "--help")
    assert ours.returncode == 0 and "--preset {tiny,2b,7b}" in ours.stdout
    assert "--micro-batch-size" not in ours.stdout
    everything = run_tool("pretrain.py", "--help-megatron", "--device", "cpu")
    assert everything.returncode == 0 and "--micro-batch-size" in everything.stdout and "--preset" in everything.stdout
