"""What a dataset is: the record beside a `.bin`/`.idx` pair.

`PREFIX.manifest.json` states the direction, the tokenizer, counts, sizes and hashes, and is
the only place where the direction of a dataset is written. It is written last: a
dataset with a manifest is whole. The fields are listed in docs/data_format.md. This module
owns reading and writing them; `data/dataset.py` compares them with a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_ledom.data.files import HashedFile, WrittenFile
from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError

FORMAT_VERSION = 3
PLAIN_VERSION = 2  # what datasets without pairs are written as: an older version reads them
SIDECARS = ("crc32", "skipped.jsonl")
REVERSE_UNITS = ("token", "sentence")
_ADDED_LATER = ("backend", "rows", "format", "bad_records", "sidecars", "pairs")
PARTS = ("question", "answer", "both")


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids.

    `type` and `model` say where it came from, `fingerprint` what it is, `backend` which library ran it.
    """

    type: str
    model: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    backend: str = ""


@dataclass(frozen=True)
class Counts:
    """What the dataset holds.

    Attributes:
        documents: documents in the index.
        tokens: ids in the `.bin` file, end-of-document ids included.
        text_bytes: UTF-8 bytes of the documents' text.
        empty_documents: records whose text gave no token; they are not in the files.
        eod_in_text: end-of-document ids that came from the text itself.
        bad_records: records that were passed over because they are no documents (`--on-bad-record skip`).
    """

    documents: int
    tokens: int
    text_bytes: int
    empty_documents: int
    eod_in_text: int
    bad_records: int = 0


@dataclass(frozen=True)
class SourceRecord:
    """An input file: resolved path, size on disk, documents of it that are in the dataset, records in it, format."""

    path: str
    bytes: int
    documents: int
    rows: int = 0
    format: str = "jsonl"


@dataclass(frozen=True)
class PairRecord:
    """What a dataset of questions and answers is.

    Attributes:
        question_key, answer_key: the fields that the texts came from.
        separator: stands between them; tokenised with the part that is conditioned on (`data/pairs.py`).
        loss_on: one of `PARTS`: what a model learns to write. The rest is read and not learnt.
    """

    question_key: str
    answer_key: str
    separator: str
    loss_on: str


@dataclass(frozen=True)
class Manifest:
    """The record of one dataset; `pairs` is None where its documents are texts."""

    direction: Direction
    append_eod: bool
    tokenizer: TokenizerRecord
    counts: Counts
    dtype: str
    files: dict[str, WrittenFile]
    sources: list[SourceRecord]
    json_key: str
    created_utc: str
    megatron_ledom_version: str
    reverse_unit: str = "token"
    sidecars: dict[str, WrittenFile] = dataclasses.field(default_factory=dict)
    pairs: PairRecord | None = None
    format_version: int = PLAIN_VERSION

    @property
    def eod_id(self) -> int | None:
        """The id that closes every document, or None where none was appended."""
        return self.tokenizer.eod_id if self.append_eod else None


def manifest_path(prefix: str | Path) -> Path:
    """Return where the manifest of the dataset `PREFIX.bin` lies."""
    return Path(f"{prefix}.manifest.json")


def dump_manifest(manifest: Manifest) -> str:
    """Return the manifest as JSON text, its own hash in the last field; ASCII, as a path need not be UTF-8."""
    fields = _fields(manifest)
    return json.dumps(fields | {"manifest_sha256": self_hash(fields)}, indent=2) + "\n"


def manifest_hash(manifest: Manifest) -> str:
    """Return the hash that the manifest holds of itself."""
    return self_hash(_fields(manifest))


def _fields(manifest: Manifest) -> dict[str, Any]:
    fields = {"format_version": manifest.format_version} | dataclasses.asdict(manifest)
    if manifest.pairs is None:
        del fields["pairs"]
    return fields


def self_hash(fields: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's fields in canonical JSON; the field `manifest_sha256` does not count."""
    kept = {name: value for name, value in fields.items() if name != "manifest_sha256"}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def has_right_hash(prefix: str | Path) -> bool:
    """Whether the manifest says what it said when it was written; true of format 1, which holds no hash."""
    fields = _read_fields(prefix)
    if fields["format_version"] == 1 and "manifest_sha256" not in fields:
        return True
    return fields.get("manifest_sha256") == self_hash(fields)


def stage_manifest(manifest: Manifest, prefix: str | Path, folder: Path | None = None) -> HashedFile:
    """Write the manifest under its temporary name; `publish` of what is returned puts it beside its dataset.

    Args:
        manifest: what the dataset is.
        prefix: of the dataset.
        folder: as for `StagedFile`.

    Raises:
        UsageError: it cannot be written.
    """
    file = HashedFile(manifest_path(prefix), folder)
    try:
        file.write(dump_manifest(manifest).encode("utf-8"))
        file.close()
    except BaseException:
        file.discard()
        raise
    return file


def save_manifest(manifest: Manifest, prefix: str | Path) -> Path:
    """Write the manifest beside its dataset, atomically, and return its path."""
    stage_manifest(manifest, prefix).publish()
    return manifest_path(prefix)


def load_manifest(prefix: str | Path) -> Manifest:
    """Read the manifest of the dataset `prefix`.

    Raises:
        InputError: it is missing, not JSON, of a later format, or a field is missing or of another type.
        DirectionError: its direction is an unknown word.
    """
    path = manifest_path(prefix)
    fields = _read_fields(prefix)
    if isinstance(fields.get("direction"), str):
        fields["direction"] = Direction.parse(fields["direction"], where=f"{path}, field 'direction'")
    manifest: Manifest = _build(Manifest, fields, str(path), "")
    if manifest.pairs is not None and (manifest.pairs.loss_on not in PARTS or "pairs" not in manifest.sidecars):
        raise InputError(
            f"{path}: pairs with the loss on {manifest.pairs.loss_on!r}, or without their file: make it anew"
        )
    if manifest.reverse_unit not in REVERSE_UNITS or set(manifest.files) != {"bin", "idx"}:
        raise InputError(
            f"{path}: reverse_unit {manifest.reverse_unit!r} and files {sorted(manifest.files)} found, "
            f"this version knows {list(REVERSE_UNITS)} and ['bin', 'idx']"
        )
    return manifest


def _read_fields(prefix: str | Path) -> dict[str, Any]:
    path = manifest_path(prefix)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist, so nobody knows in which direction {prefix} runs. "
            "Make the dataset with tools/preprocess_data.py"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}; make the dataset anew") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("format_version"), int):
        raise InputError(f"{path} is no manifest of a dataset: it has no format_version")
    if fields["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{path} has format {fields['format_version']}, this version reads up to {FORMAT_VERSION}; "
            "use the megatron_ledom that wrote it, or a later one"
        )
    return fields


def _build(kind: Any, value: Any, path: str, field: str) -> Any:
    """Turn parsed JSON into `kind` (a dataclass, list, dict or plain type), or say which field is wrong."""
    if kind == PairRecord | None:
        kind = PairRecord if value is not None else type(None)
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        added_later = {f.name for f in dataclasses.fields(kind) if f.name in _ADDED_LATER}
        missing = [f"{field}{name}" for name in hints if name not in value and name not in added_later]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)}; make the dataset anew")
        given = {name: hint for name, hint in hints.items() if name in value}
        return cast("type", kind)(
            **{name: _build(hint, value[name], path, f"{field}{name}.") for name, hint in given.items()}
        )
    if origin is list and isinstance(value, list):
        (item,) = typing.get_args(kind)
        return [_build(item, v, path, f"{field}{i}.") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        _, item = typing.get_args(kind)
        return {k: _build(item, v, path, f"{field}{k}.") for k, v in value.items()}
    if type(value) is kind:
        return value
    raise InputError(f"{path}: field {field.rstrip('.')} is {value!r}, which is of the wrong type")
