r"""The proof of an export: its logits against those of Megatron's own model, loaded from the checkpoint.

Two independent roads from the same files to the same numbers:

    checkpoint --Megatron's loader--> GPTModel         --\
                                                           compare at every position
    checkpoint --this package--> folder --transformers--> LlamaForCausalLM --/

Both compute in fp32 on the CPU. Where the export has another dtype than the checkpoint,
Megatron's weights are rounded to it first, so that what is compared is the conversion and
not the rounding. Megatron on the CPU needs patches that last for a whole process, so the
comparison is a process of its own: `python -m megatron_ledom.convert.parity`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import ParityError, run_cli

if TYPE_CHECKING:
    import torch

REPORT_NAME = "parity.json"
RELATIVE_TOLERANCE = 1e-4
"""Largest |difference| of two logits over the largest |logit|. fp32 sums in another order stay below 1e-5; a wrong
row, a wrong rotary base or a swapped pair gives 1e-2 and more (a base of 10,500 for 10,000: 0.16)."""
LOGPROB_TOLERANCE = 1e-3
"""Largest difference of a token's log-probability, in nats: the first bound times logits of up to ten."""
MAX_LENGTH = 256
TEXT = (
    "The reverse model reads a document from its last token to its first. What came before this sentence? "
    "In 1835 the comet returned, as had been foretold; nobody in the village, not even the schoolmaster, had "
    "believed it.\n\ndef previous(step):\n    return step - 1\n"
)


def check_parity(checkpoint_folder: Path, hf_folder: Path) -> dict[str, Any]:
    """Compare in a new process and return the report.

    Args:
        checkpoint_folder: an `iter_NNNNNNN` folder.
        hf_folder: the export: configuration, weights and tokenizer.

    Raises:
        ParityError: the logits differ by more than the tolerances, or could not be compared.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report_path = Path(scratch) / REPORT_NAME
        command = [sys.executable, "-m", "megatron_ledom.convert.parity"]
        command += ["--load", str(checkpoint_folder), "--hf", str(hf_folder), "--report", str(report_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        if not report_path.is_file():
            last_words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            raise ParityError(
                f"the logits of {checkpoint_folder} could not be compared (exit status {done.returncode}); "
                f"--no-parity exports without. Its last words:\n{last_words}"
            )
        report: dict[str, Any] = json.loads(report_path.read_text(encoding="utf-8"))
    if not report["passed"]:
        raise ParityError(
            f"the exported logits differ from Megatron's: {report['max_relative_difference']:.3g} of the largest logit "
            f"(at most {report['relative_tolerance']:g}), {report['max_logprob_difference']:.3g} nats "
            f"(at most {report['logprob_tolerance']:g}), over {report['positions']} positions. Nothing was exported"
        )
    return report


def compare_logits(checkpoint_folder: Path, hf_folder: Path) -> dict[str, Any]:
    """Compare in this process, which keeps the CPU engine's patches afterwards; return the report."""
    import gc

    import torch

    from megatron_ledom.checkpoint import Checkpoint

    config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    direction = Direction.parse(config["ledom"]["direction"], where=f"{hf_folder}/config.json")
    ids_model = probe_ids(hf_folder, config, direction)
    # transformers first, so that no patch of the CPU engine can have a part in its answer
    found = hf_logits(hf_folder, ids_model)
    gc.collect()
    padded = megatron_logits(Checkpoint.open(checkpoint_folder), ids_model, dtype=config["dtype"])
    expected = padded[..., : config["vocab_size"]]
    difference = (found - expected).abs().max().item()
    relative = difference / expected.abs().max().item()
    logprob = (_token_logprobs(found, ids_model) - _token_logprobs(expected, ids_model)).abs().max().item()
    return {
        "passed": relative <= RELATIVE_TOLERANCE and logprob <= LOGPROB_TOLERANCE,  # false for NaN
        "max_relative_difference": relative,
        "max_absolute_difference": difference,
        "max_logprob_difference": logprob,
        "mean_padding_probability": padded.softmax(-1)[..., config["vocab_size"] :].sum(-1).mean().item(),
        "mean_loss_megatron": -_token_logprobs(expected, ids_model).mean().item(),
        "mean_loss_hf": -_token_logprobs(found, ids_model).mean().item(),
        "relative_tolerance": RELATIVE_TOLERANCE,
        "logprob_tolerance": LOGPROB_TOLERANCE,
        "positions": ids_model.numel(),
        "computed_in": "float32",
        "weights": config["dtype"],
        "direction": str(direction),
        "checkpoint": checkpoint_folder.name,
        "text": TEXT,
        "torch": torch.__version__,
    }


def probe_ids(hf_folder: Path, config: dict[str, Any], direction: Direction) -> torch.Tensor:
    """Two rows of ids in the model's order, int64 [2, S]: real text, and ids drawn from the whole vocabulary."""
    import torch
    from transformers import AutoTokenizer

    length = min(MAX_LENGTH, config["max_position_embeddings"])
    tokenizer = AutoTokenizer.from_pretrained(hf_folder, trust_remote_code=False)
    ids_nat = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids_nat = (ids_nat * (length // max(len(ids_nat), 1) + 1))[:length]
    text_row = torch.tensor(to_model_order(ids_nat, direction))
    generator = torch.Generator().manual_seed(1234)
    return torch.stack([text_row, torch.randint(0, config["vocab_size"], (length,), generator=generator)])


def megatron_logits(checkpoint: Any, ids_model: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """Megatron's logits, fp32 [B, S, padded vocabulary], with its weights rounded to `dtype`."""
    import torch

    from megatron_ledom.checkpoint.model import load_megatron_model

    model = load_megatron_model(checkpoint)
    positions = torch.arange(ids_model.shape[1]).expand_as(ids_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        return model(ids_model, positions, None).float()


def hf_logits(hf_folder: Path, ids_model: torch.Tensor) -> torch.Tensor:
    """The exported model's logits, fp32 [B, S, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf_folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        return model(input_ids=ids_model).logits


def main(argv: list[str]) -> int:
    """Compare, and write the report whether the comparison passes or not."""
    parser = argparse.ArgumentParser(description="Compare an exported folder's logits with Megatron's.")
    parser.add_argument("--load", type=Path, required=True, help="an iter_NNNNNNN folder")
    parser.add_argument("--hf", type=Path, required=True, help="the exported folder")
    parser.add_argument("--report", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(argv)
    report = compare_logits(options.load, options.hf)
    options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


def _token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log P of each id given those before it, [B, S - 1]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def _environment() -> dict[str, str]:
    """The caller's environment without what a launcher put there for its own ranks."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in launcher}


if __name__ == "__main__":
    run_cli(main)
