r"""The proof of a conversion: the folder's logits against those of Megatron's own model, from the checkpoint.

Two independent roads from the same weights to the same numbers:

    checkpoint --Megatron's sharding, torch's reader--> GPTModel         --\
                                                                             compare at every position
    folder     --safetensors, transformers-->           LlamaForCausalLM --/

Both hold one layer at a time (`checkpoint.streamed_model`, `parity_hf`), so that memory does
not grow with depth: 2.3 GB for the layers and tables of a 7B. What is judged (`parity_compare`):

    fp32            logits, log-probabilities, sentence losses, every row of the embedding
    saved dtype     the folder's error against fp32, beside Megatron's own error in that dtype
    gradients       of every parameter, where the model is small enough (`parity_gradients`)

Every weight is rounded to the conversion's dtype on both sides first, so that the conversion
is judged and not the rounding. Megatron on the CPU needs patches that last for a whole
process, so the comparison is a process of its own: `python -m megatron_ledom.convert.parity`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_ledom.convert.parity_compare import DTYPES, MAX_GRADIENT_PARAMETERS, PROGRESS, compare
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ParityError, run_cli

REPORT_NAME = "parity.json"
_M_MMAP_THRESHOLD = -3  # malloc.h


def check_parity(
    checkpoint_folder: Path, hf_folder: Path, *, direction: Direction | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Compare in a new process, with its progress on standard error, and return the report.

    Args:
        checkpoint_folder: a step's folder, or one that holds steps.
        hf_folder: configuration, weights and, where sentences are to be compared, a tokenizer.
        direction: of the model; None for what config.json says.
        dtype: of the conversion's output ("float32", "bfloat16", "float16"); None for what config.json says.

    Raises:
        ParityError: the models differ by more than the tolerances, or could not be compared.
    """
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        report_path = Path(scratch) / REPORT_NAME
        command = [sys.executable, "-m", "megatron_ledom.convert.parity"]
        command += ["--load", str(checkpoint_folder), "--hf", str(hf_folder), "--report", str(report_path)]
        command += [] if direction is None else ["--direction", str(direction)]
        command += [] if dtype is None else ["--dtype", dtype]
        status, last_words = _run_with_progress(command)
        if not report_path.is_file():
            how = f"exit status {status}" if status >= 0 else f"killed by signal {-status}: out of memory?"
            raise ParityError(
                f"{hf_folder} could not be compared with {checkpoint_folder} ({how}); "
                f"--no-parity converts without. The last words of the comparison:\n{last_words}"
            )
        report: dict[str, Any] = json.loads(report_path.read_text(encoding="utf-8"))
    if not report["passed"]:
        raise ParityError(f"{hf_folder} is not the model of {checkpoint_folder}: {'; '.join(report['problems'])}")
    return report


def _run_with_progress(command: list[str]) -> tuple[int, str]:
    """Run a comparison, pass its progress on, and return its exit status and last words."""
    last: collections.deque[str] = collections.deque(maxlen=8)
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=_environment()
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith(f"{PROGRESS}:"):
                print(line, end="", file=sys.stderr, flush=True)
            elif line.strip():
                last.append(line.rstrip())
        status = child.wait()
    refusal = [line.removeprefix("error: ") for line in last if line.startswith("error: ")]
    return status, "\n".join(refusal or last)


def _environment() -> dict[str, str]:
    """The caller's environment, without what a launcher put there for its own ranks; nothing is fetched."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in os.environ.items() if key not in launcher} | {"HF_HUB_OFFLINE": "1"}


def _return_freed_memory() -> None:
    """Make glibc give every large block back to the system when it is freed.

    By default it raises the size that counts as large up to 32 MB, and the layers of a 7B then
    leave holes: 0.4 GB more than is used.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**18)


def main(argv: list[str]) -> int:
    """Compare, and write the report whether the comparison passes or not."""
    parser = argparse.ArgumentParser(description="Compare a Hugging Face folder's logits with a Megatron checkpoint's.")
    parser.add_argument("--load", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--hf", type=Path, required=True, help="the Hugging Face folder")
    parser.add_argument("--report", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--direction", type=Direction, choices=list(Direction), help="where config.json does not say it"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="both sides' weights are rounded to it (default: as in config.json)",
    )
    parser.add_argument(
        "--max-gradient-parameters",
        type=int,
        default=MAX_GRADIENT_PARAMETERS,
        help="gradients, too, are compared up to this size; they need 8 bytes of memory a parameter (%(default)s)",
    )
    options = parser.parse_args(argv)
    _return_freed_memory()
    report = compare(
        options.load,
        options.hf,
        direction=options.direction,
        dtype=options.dtype,
        max_gradient_parameters=options.max_gradient_parameters,
    )
    options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    run_cli(main)
