"""What a model's folder says about itself, read without torch or transformers.

Owns the reading of the `ledom` record that the conversion writes into
`config.json`, or of a checkpoint's arguments, and the refusal of a model that runs the wrong way. It doesn't load
weights (`model.py`) and doesn't write folders (`megatron_ledom.convert`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DirectionError, InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class FolderRecord:
    """A model folder and what its `config.json`, or the arguments of its checkpoint, say.

    Attributes:
        folder: where it is; of a run's checkpoints the last finished one, whatever is saved meanwhile.
        config: the parsed `config.json`; of a checkpoint what is known before it is loaded.
        direction: `ledom.direction`, or None in a model that was not exported here.
        tokenizer_fingerprint: `ledom.tokenizer_fingerprint`, or None.
        is_checkpoint: whether it is Megatron's and not Hugging Face's.
    """

    folder: Path
    config: dict[str, Any]
    direction: Direction | None
    tokenizer_fingerprint: str | None
    is_checkpoint: bool = False


def load_record(folder: str | Path) -> FolderRecord:
    """Read the record of a model folder.

    Raises:
        InputError: the folder, its `config.json` or its tokenizer is missing, or the
            configuration is not a JSON object.
        CheckpointError: the folder is Megatron's, and its checkpoint is unfinished or damaged.
        DirectionError: a `ledom` record whose direction is absent or unknown.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise InputError(f"model folder {folder}: {found}. Name a folder written by tools/convert_to_hf.py")
    path = folder / "config.json"
    if not path.is_file():
        return _checkpoint_record(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"model folder {folder} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). "
            "Copy the files of the tokenizer that the model was trained with into it"
        )
    config = _read_config(path)
    record = config.get("ledom")
    if record is None:
        return FolderRecord(folder, config, None, None)
    said = record.get("direction", "nothing") if isinstance(record, dict) else repr(record)
    direction = Direction.parse(str(said), where=f"{path}, key ledom.direction,")
    return FolderRecord(folder, config, direction, record.get("tokenizer_fingerprint"))


def _checkpoint_record(folder: Path) -> FolderRecord:
    from megatron_ledom.checkpoint import Checkpoint
    from megatron_ledom.checkpoint.locate import INDEX, TRACKER

    if not any((folder / name).is_file() for name in (TRACKER, INDEX)):
        raise InputError(
            f"model folder {folder} has no config.json: it is not a Hugging Face model, and no Megatron checkpoint "
            f"either (no {TRACKER})"
        )
    checkpoint = Checkpoint.open(folder)
    config = {"max_position_embeddings": getattr(checkpoint.args, "max_position_embeddings", None)}
    fingerprint = getattr(checkpoint.args, "tokenizer_fingerprint", None)
    return FolderRecord(checkpoint.folder, config, checkpoint.direction, fingerprint, is_checkpoint=True)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. Export the model again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a {type(config).__name__}, a JSON object is needed. Export the model again")
    return config


def check_direction(record: FolderRecord, wanted: Direction, assumed: Direction | None = None) -> None:
    """Refuse a model that runs the other way, or that may do so.

    A model with a record is taken at its word, whatever is assumed. A model without
    one is an ordinary forward model, unless the caller says that it is not.

    Args:
        record: of the model's folder.
        wanted: the direction that the caller's computation needs.
        assumed: what the caller knows about a model without a record.

    Raises:
        DirectionError: the model isn't known to run in the wanted direction.
    """
    where = record.folder / "config.json"
    source = "its saved arguments" if record.is_checkpoint else f"{where}, key ledom.direction"
    if record.direction is not None:
        if record.direction is not wanted:
            raise DirectionError(
                f"{record.folder} is a {record.direction} model ({source}), "
                f"a {wanted} model is needed here. Name the {wanted} model's folder"
            )
        return
    if wanted is Direction.REVERSE and assumed is None:
        raise DirectionError(
            f"{where} does not say which way the model runs (no key ledom.direction), so it counts as a forward "
            "model, and a reverse model is needed here. If it was trained on reversed ids by others, say so with "
            '--assume-reverse (in Python: assume_direction="reverse")'
        )
    if assumed is not None and assumed is not wanted:
        raise DirectionError(
            f"{record.folder} was said to be a {assumed} model, a {wanted} model is needed here. "
            f"Name the {wanted} model's folder"
        )
