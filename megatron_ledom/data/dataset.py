"""What must hold before a dataset is trained on.

It compares manifests and file sizes with the run; it opens no token. Megatron's dataset
classes are built in `megatron_ledom/train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ledom.data.indexed import read_index_header
from megatron_ledom.data.manifest import Manifest, load_manifest, manifest_path
from megatron_ledom.direction import Direction, check_same_direction
from megatron_ledom.errors import InputError, TokenizerMismatchError
from megatron_ledom.log import get_logger


def check_datasets(
    prefixes: Sequence[str | Path],
    *,
    direction: Direction,
    tokenizer_fingerprint: str | None,
    asked_by: str = "this run (--direction)",
) -> list[Manifest]:
    """Refuse datasets that are not whole, run the other way, or were made with another tokenizer.

    Args:
        prefixes: paths without suffix, as in Megatron's `--data-path`.
        direction: the direction of the model.
        tokenizer_fingerprint: `Tokenizer.fingerprint` of the run's tokenizer, or None not to compare it.
        asked_by: who wants that direction, for the message.

    Returns:
        The manifests, in the order of `prefixes`.

    Raises:
        InputError: a file is missing or has not the size or counts that the manifest states.
        DirectionError: a dataset runs in the other direction.
        TokenizerMismatchError: a dataset was made with another tokenizer.
    """
    return [
        _check_dataset(str(prefix), direction=direction, fingerprint=tokenizer_fingerprint, asked_by=asked_by)
        for prefix in prefixes
    ]


def _check_dataset(prefix: str, *, direction: Direction, fingerprint: str | None, asked_by: str) -> Manifest:
    _check_files_exist(prefix)
    manifest = load_manifest(prefix)
    found_in = f"the dataset {prefix} (says {manifest_path(prefix).name})"
    check_same_direction(direction, manifest.direction, expected_by=asked_by, found_in=found_in)
    made_with = manifest.tokenizer
    if fingerprint is not None and made_with.fingerprint != fingerprint:
        raise TokenizerMismatchError(
            f"the dataset {prefix} was made with the tokenizer {made_with.type} {made_with.model} "
            f"({made_with.fingerprint}), the run uses another one ({fingerprint}). "
            "Use the same tokenizer, or preprocess the text again with the run's"
        )
    _check_files_whole(prefix, manifest)
    if not manifest.append_eod:
        get_logger(__name__).warning(
            "warning: %s was made without --append-eod: documents run into each other, and the model "
            "cannot learn where one %s",
            prefix,
            "begins" if manifest.direction is Direction.REVERSE else "ends",
        )
    return manifest


def _check_files_exist(prefix: str) -> None:
    missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
    if missing:
        likely = [p.with_suffix("") for p in sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*.idx"))]
        if prefix.endswith((".bin", ".idx")):
            likely = [Path(prefix).with_suffix("")]
        hint = f"; did you mean {likely[0]}?" if likely and str(likely[0]) != prefix else ""
        raise InputError(f"the dataset {prefix} is not there: no {' and no '.join(missing)}{hint}")


def _check_files_whole(prefix: str, manifest: Manifest) -> None:
    for suffix, expected in manifest.files.items():
        path = Path(f"{prefix}.{suffix}")
        found_bytes = path.stat().st_size
        if found_bytes != expected.bytes:
            raise InputError(
                f"{path} has {found_bytes:,} bytes, its manifest says {expected.bytes:,}: "
                "it was cut off or replaced. Copy it again, or preprocess again"
            )
    header = read_index_header(Path(f"{prefix}.idx"))
    expected_header = (manifest.dtype, manifest.counts.documents, manifest.counts.documents + 1)
    found_header = (header.dtype, header.num_sequences, header.num_boundaries)
    if found_header != expected_header:
        raise InputError(
            f"{prefix}.idx does not belong to its manifest: (dtype, documents, boundaries) is {found_header}, "
            f"the manifest says {expected_header}. Copy all three files again, or preprocess again"
        )
