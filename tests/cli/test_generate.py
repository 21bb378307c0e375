"""tools/generate.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.inference import ReverseLM
from megatron_ledom.testing import run_tool

LATER = " is evaluated before the statement."


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("reverse"), tokenizer_folder, "reverse")


def test_prints_what_the_library_writes(folder: Path) -> None:
    flags = [
        "--max-new-tokens",
        12,
        "--num-samples",
        2,
        "--seed",
        3,
        "--temperature",
        0.9,
        "--top-k",
        50,
        "--top-p",
        0.9,
    ]
    result = run_tool("generate.py", "--model", folder, "--text", LATER, *flags, "--device", "cpu", "--jsonl")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = ReverseLM.load(folder, device="cpu").write_before(
        LATER, max_new_tokens=12, num_samples=2, seed=3, temperature=0.9, top_k=50, top_p=0.9
    )
    assert [line["earlier"] for line in lines] == expected
    assert all(line["whole"] == line["earlier"] + LATER and line["seed"] == 3 for line in lines)
    assert result.stderr == ""


def test_plain_output_of_a_file_and_an_unlabelled_model(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "unlabelled", tokenizer_folder, None)
    (tmp_path / "later.txt").write_text(LATER)
    arguments = ["--model", model, "--text-file", tmp_path / "later.txt", "--greedy", "--max-new-tokens", 5, "--whole"]
    result = run_tool("generate.py", *arguments, "--assume-reverse", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(LATER + "\n")
    assert len(result.stdout) > len(LATER) + 1
    refused = run_tool("generate.py", *arguments)
    assert refused.returncode == 2
    assert "--assume-reverse" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "absent", "--text", "a"], "error: model folder absent: there is no such folder"),
        (["--text", "a", "--temperature", "0"], "error: temperature is 0.0, it must be above 0"),
        (["--text-file", "absent.txt"], "error: --text-file absent.txt: "),
        (["--text", "a", "--text-file", "b"], "not allowed with argument"),
        ([], "one of the arguments --text --text-file is required"),
    ],
)
def test_bad_input_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    result = run_tool("generate.py", "--model", folder, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_forward_model_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "forward", tokenizer_folder, "forward")
    result = run_tool("generate.py", "--model", model, "--text", "a", "--assume-reverse")
    assert result.returncode == 2
    assert "is a forward model" in result.stderr


def test_help_says_what_it_does() -> None:
    result = run_tool("generate.py", "--help")
    assert result.returncode == 0
    assert "comes before a given text" in result.stdout
