"""tools/evaluate_few_shot.py and tools/evaluate_harness.py as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_models import save_random_model

from megatron_ledom.testing import run_tool

TASK = """
task: ledom_pair
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: ["yes", "no"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("reverse"), tokenizer_folder, "reverse")


def test_few_shot(model: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n")
    flags = ["--model", model, "--input", asked, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 5]
    done = run_tool("evaluate_few_shot.py", *flags, "--num-shots", 0)
    assert done.returncode == 0, done.stderr
    assert "0 of 1 right, 0.0 % (95 %: 0.0 to 79.3); 0 said an answer" in done.stdout
    done = run_tool("evaluate_few_shot.py", *flags, "--overwrite")
    assert done.returncode == 2
    assert "error: --num-shots 4: 0 demonstrations were given" in done.stderr


def test_harness(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"question": "A?", "label": n}) + "\n" for n in (0, 1)))
    (tmp_path / "task.yaml").write_text(TASK.format(path=tmp_path / "data.jsonl"))
    flags = ["--model", model, "--include-path", tmp_path, "--output", tmp_path / "out.json"]
    done = run_tool("evaluate_harness.py", *flags, "--tasks", "ledom_pair", env={"HF_DATASETS_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "reverse model, reading joint" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["results"]["ledom_pair"]["acc,none"] == 0.5
    done = run_tool("evaluate_harness.py", *flags, "--tasks", "absent", "--overwrite")
    assert done.returncode == 2
    assert "error: the harness knows no task absent" in done.stderr
