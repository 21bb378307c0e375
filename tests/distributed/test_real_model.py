"""SmolLM2-135M, imported: Megatron and transformers agree on every token, and on ten steps of training."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import build_smollm2
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_ledom.testing import (
    REPOSITORY,
    english_documents,
    run_tool,
    tool_environment,
    torchrun_command,
    write_jsonl,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

TOLERANCE = 1e-4
LAYOUTS = {"TP1 PP1": (1, 1), "PP2": (1, 2), "TP3": (3, 1)}
STEPS, LENGTH, BATCH = 10, 96, 2
LR, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 5e-6, (0.9, 0.95), 1e-8, 0.1, 1.0


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_smollm2(tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.fixture(scope="module")
def imported(original: Path) -> Path:
    """The checkpoint, with the tool's defaults: parity against transformers has passed."""
    save = original.parent / "megatron"
    done = run_tool("convert_from_hf.py", "--load", original, "--save", save, "--direction", "forward", timeout_s=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "forward model, 134,515,008 parameters in float32" in done.stdout
    return save


@pytest.fixture(scope="module")
def data(imported: Path) -> Path:
    folder = imported.parent
    done = run_tool(
        "preprocess_data.py",
        *("--input", write_jsonl(folder / "reference.jsonl", english_documents()), "--output-prefix", folder / "data"),
        *("--direction", "forward", "--append-eod"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", imported / "tokenizer"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "data_text_document"


def train(imported: Path, data: Path, layout: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """Train under the layout; return tokens, labels and losses [BATCH, LENGTH] of every step."""
    tensor, pipeline = LAYOUTS[layout]
    run = imported.parent / layout.replace(" ", "-")
    records = run.parent / f"{run.name}-records"
    records.mkdir()
    command = torchrun_command(
        "pretrain.py",
        tensor * pipeline,
        [
            *("--device", "cpu", "--direction", "forward", "--run-dir", run, "--data-path", data),
            *("--pretrained-checkpoint", imported, "--use-checkpoint-args", "--seq-length", LENGTH),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", imported / "tokenizer"),
            *("--tensor-model-parallel-size", tensor, "--pipeline-model-parallel-size", pipeline),
            *("--micro-batch-size", 1, "--global-batch-size", BATCH, "--train-iters", STEPS, "--exit-interval", steps),
            *("--lr", LR, "--lr-decay-style", "constant", "--adam-beta1", BETAS[0], "--adam-beta2", BETAS[1]),
            *("--adam-eps", EPSILON, "--weight-decay", WEIGHT_DECAY, "--clip-grad", CLIP),
            *("--eval-iters", 1, "--log-interval", 1, "--no-save-optim"),
        ],
    )
    recorder = REPOSITORY / "tests" / "distributed" / "record_losses.py"
    command = [str(recorder) if word == str(REPOSITORY / "tools" / "pretrain.py") else word for word in command]
    environment = tool_environment({"RECORD_TO": str(records)})
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    found = [torch.load(path) for path in sorted(records.iterdir(), key=lambda path: int(path.stem))]
    assert [len(micro_batches) for micro_batches in found] == [BATCH] * steps
    return [{key: torch.cat([m[key] for m in batch]) for key in ("tokens", "labels", "losses")} for batch in found]


@pytest.fixture(scope="module")
def trained(imported: Path, data: Path) -> list[dict[str, torch.Tensor]]:
    return train(imported, data, "TP1 PP1", STEPS)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def losses(model: Any, step: dict[str, torch.Tensor]) -> torch.Tensor:
    """Minus the log-probability of every label, [B, S]."""
    # Flattened: over a strided axis torch adds up 49,152 exponentials one by one, and is off by 3e-4 nats in fp32.
    logits = model(input_ids=step["tokens"]).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, step["labels"].flatten(), reduction="none").view(BATCH, LENGTH)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_log_probability_is_that_of_transformers(
    layout: str, original: Path, imported: Path, data: Path, trained: list[dict[str, torch.Tensor]]
) -> None:
    first = trained[0] if layout == "TP1 PP1" else train(imported, data, layout, 1)[0]
    with torch.no_grad():
        difference = (losses(load(original), first) - first["losses"]).abs().max().item()
    print(f"{layout}: log-probabilities of {first['losses'].numel()} tokens within {difference:.1e} nats")
    assert first["losses"].shape == (BATCH, LENGTH) and 1 < first["losses"].mean() < 6
    assert difference <= TOLERANCE


def test_ten_steps_of_training_have_the_same_losses(original: Path, trained: list[dict[str, torch.Tensor]]) -> None:
    model = load(original)
    named = dict(model.named_parameters())
    decayed = [p for p in named.values() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}]
    groups.append({"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPSILON)
    found, expected = [], [step["losses"].mean().item() for step in trained]
    for step in trained:
        loss = losses(model, step).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    print(f"ten steps: losses {found[0]:.4f} to {found[-1]:.4f}, within {worst:.1e} of Megatron's")
    with torch.no_grad():
        again = losses(model, trained[0]).mean().item()
    print(f"the first batch's loss afterwards: {again:.4f}")
    assert again < found[0] - 0.01, "the weights must have moved, else equality says little"
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_the_export_is_the_original_bit_for_bit(original: Path, imported: Path) -> None:
    output = imported.parent / "back"
    done = run_tool("convert_to_hf.py", "--load", imported, "--output", output, timeout_s=900)
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = (
        {k: v for p in sorted(f.glob("*.safetensors")) for k, v in load_file(p).items()} for f in (output, original)
    )
    assert set(ours) == set(theirs) and all(ours[key].equal(theirs[key]) for key in theirs)
