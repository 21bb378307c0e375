"""The run directory: what was launched, and the tokenizer that belongs to the weights.

    RUN/run.json       one entry a launch: command line, layout, versions, data
    RUN/checkpoints/   Megatron's --save
    RUN/tensorboard/   Megatron's --tensorboard-dir
    RUN/tokenizer/     a copy of the tokenizer's files, so that a run can be moved as one folder

It owns run.json and tokenizer/; Megatron writes the other two.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ledom.data.dataset import CheckedDataset
from megatron_ledom.errors import InputError

FORMAT_VERSION = 1
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
"""What is not a tokenizer's: one is often named by its model's folder."""
LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("data_parallel_size", "context_parallel_size", "sequence_parallel", "use_distributed_optimizer"),
)


def record_launch(
    args: argparse.Namespace, argv: Sequence[str], datasets: Mapping[str, CheckedDataset], start: Mapping[str, int]
) -> None:
    """Add this launch to RUN/run.json and copy the tokenizer; call on one rank.

    Args:
        args: Megatron's namespace with ours in it.
        argv: the command line without the program.
        datasets: prefix -> what was found out about the dataset, from the guards.
        start: `steps` and `samples` that the run has behind it.

    Raises:
        InputError: RUN/run.json exists and cannot be read.
    """
    run = Path(args.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    path = run / "run.json"
    new: dict[str, Any] = {"format_version": FORMAT_VERSION, "launches": []}
    record = read_run(run) if path.is_file() else new
    record["launches"].append(_describe_launch(args, argv, datasets, start))
    write_json(path, record)
    copy_tokenizer(tokenizer_files(args), run / "tokenizer")


def read_run(run: Path) -> dict[str, Any]:
    """Read RUN/run.json.

    Raises:
        InputError: it is missing, not JSON, or of a later format.
    """
    path = run / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{run} is not a run directory: it has no run.json") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); remove it to start the record anew"
        ) from error
    if record.get("format_version", 0) > FORMAT_VERSION:
        raise InputError(f"{path} has format {record['format_version']}, this version reads up to {FORMAT_VERSION}")
    return record


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON under a temporary name beside `path`, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def tokenizer_files(args: argparse.Namespace) -> dict[str, Path]:
    """The files of a run's tokenizer: the name that each has in a tokenizer's folder -> where it is; {} without one."""
    if args.tokenizer_type == "GPT2BPETokenizer" and args.vocab_file and args.merge_file:
        return {"vocab.json": Path(args.vocab_file), "merges.txt": Path(args.merge_file)}
    if args.tokenizer_model is None:
        return {}
    source = Path(args.tokenizer_model)
    if not source.is_dir():
        return {source.name: source} if source.is_file() else {}
    return {path.name: path for path in source.iterdir() if path.is_file() and not path.name.endswith(WEIGHTS)}


def copy_tokenizer(files: Mapping[str, Path], target: Path) -> None:
    """Copy a tokenizer's files to the folder `target`; an existing copy is left alone."""
    if target.exists() or not files:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    for name, source in files.items():
        shutil.copy2(source, temporary / name)
    temporary.rename(target)


def _describe_launch(
    args: argparse.Namespace, argv: Sequence[str], datasets: Mapping[str, CheckedDataset], start: Mapping[str, int]
) -> dict[str, Any]:
    packages = ("megatron-ledom", "megatron-core", "torch", "transformers", "tokenizers")
    return {
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command_line": [str(a) for a in argv],
        "preset": args.preset,
        "direction": args.direction,
        "device": args.device,
        "world_size": args.world_size,
        "layout": {name: getattr(args, name, None) for name in LAYOUT},
        "load": args.load,
        "tokenizer": {
            "type": args.tokenizer_type,
            "model": args.tokenizer_model,
            "fingerprint": args.tokenizer_fingerprint,
        },
        "start": dict(start),
        "data": {prefix: _describe_dataset(dataset) for prefix, dataset in datasets.items()},
        "megatron_arguments": {k: v for k, v in sorted(vars(args).items()) if not k.startswith("_")},
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "host": platform.node(),
        "working_directory": str(Path.cwd()),
    }


def _describe_dataset(dataset: CheckedDataset) -> dict[str, Any]:
    return {
        "direction": str(dataset.direction),
        "is_read_backwards": dataset.is_turned,
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "bin_bytes": dataset.bin_bytes,
        "bin_sha256": dataset.bin_sha256,
        "pairs": dataset.pairs and asdict(dataset.pairs),
    }
