"""What must hold before a dataset is trained on, and whether its documents are to be read backwards.

It compares manifests and file sizes with the run. Of files without a manifest, which Megatron's own tools
write, it looks at a sample of ids. Megatron's dataset classes are in `data/megatron_dataset.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ledom.data.indexed import HEADER, read_index_header
from megatron_ledom.data.manifest import Manifest, PairRecord, load_manifest, manifest_path
from megatron_ledom.data.pairs import SIDECAR
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DirectionError, InputError, TokenizerMismatchError
from megatron_ledom.log import get_logger

SAMPLED_DOCUMENTS = 1000
SAMPLED_IDS = 1 << 20


@dataclass(frozen=True)
class CheckedDataset:
    """A dataset that a run may read.

    Attributes:
        prefix: its path without suffix.
        manifest: what it says of itself; None for files of Megatron's own tools.
        direction: how its documents are stored.
        is_closed: whether the last id of each is the end-of-document id.
        is_turned: whether they are read the other way round than stored.
        num_documents, num_tokens: what the index holds.
        bin_bytes: size of the `.bin` file.
        bin_sha256: its hash; None where no manifest states it.
    """

    prefix: str
    manifest: Manifest | None
    direction: Direction
    is_closed: bool
    is_turned: bool
    num_documents: int
    num_tokens: int
    bin_bytes: int
    bin_sha256: str | None

    @property
    def pairs(self) -> PairRecord | None:
        """What its pairs are; None where its documents are texts."""
        return None if self.manifest is None else self.manifest.pairs

    @property
    def read_as(self) -> Direction:
        """The direction in which its documents reach the model."""
        if not self.is_turned:
            return self.direction
        return Direction.FORWARD if self.direction is Direction.REVERSE else Direction.REVERSE


def check_datasets(
    prefixes: Sequence[str | Path],
    *,
    direction: Direction,
    tokenizer_fingerprint: str | None,
    eod_id: int | None = None,
    vocab_size: int | None = None,
) -> list[CheckedDataset]:
    """Refuse datasets that are not whole, were made with another tokenizer, or cannot be read in this direction.

    A dataset of the other direction is read backwards, document by document; where sentences and not
    tokens were reversed, that gives no text of the other direction, and is refused.

    Args:
        prefixes: paths without suffix, as in Megatron's `--data-path`.
        direction: the direction of the model.
        tokenizer_fingerprint: `Tokenizer.fingerprint` of the run's tokenizer, or None not to compare it.
        eod_id: its end-of-document id, for files without a manifest; None refuses such files.
        vocab_size: its number of ids, likewise.

    Returns:
        What they are, in the order of `prefixes`.

    Raises:
        InputError: a file is missing or has not the size or counts that the manifest states, or a file
            without a manifest holds ids that do not fit the run's tokenizer.
        DirectionError: a dataset cannot be read in this direction.
        TokenizerMismatchError: a dataset was made with another tokenizer.
    """
    checked = []
    for prefix in map(str, prefixes):
        _check_files_exist(prefix)
        if manifest_path(prefix).is_file() or eod_id is None or vocab_size is None:
            dataset = _check_with_manifest(prefix, direction, tokenizer_fingerprint)
        else:
            dataset = _check_without_manifest(prefix, direction, eod_id, vocab_size)
        _report(dataset)
        checked.append(dataset)
    return checked


def _check_with_manifest(prefix: str, direction: Direction, fingerprint: str | None) -> CheckedDataset:
    manifest = load_manifest(prefix)
    made_with = manifest.tokenizer
    if fingerprint is not None and made_with.fingerprint != fingerprint:
        raise TokenizerMismatchError(
            f"the dataset {prefix} was made with the tokenizer {made_with.type} {made_with.model} "
            f"({made_with.fingerprint}), the run uses another one ({fingerprint}). "
            "Use the same tokenizer, or preprocess the text again with the run's"
        )
    _check_files_whole(prefix, manifest)
    is_turned = manifest.direction is not direction
    if is_turned and manifest.pairs is not None:
        raise DirectionError(
            f"this run (--direction) is a {direction} model, but the pairs {prefix} were tokenised for a "
            f"{manifest.direction} one (says {manifest_path(prefix).name}): the separator belongs to the other part "
            f"there. Make {direction} pairs (tools/preprocess_pairs.py --direction {direction})"
        )
    if is_turned and manifest.reverse_unit != "token":
        raise DirectionError(
            f"this run (--direction) is a {direction} model, but the dataset {prefix} is {manifest.direction} with "
            f"reverse_unit {manifest.reverse_unit!r} (says {manifest_path(prefix).name}): read backwards it gives no "
            f"{direction} text. Make {direction} data (tools/preprocess_data.py --direction {direction})"
        )
    return CheckedDataset(
        prefix=prefix,
        manifest=manifest,
        direction=manifest.direction,
        is_closed=manifest.append_eod,
        is_turned=is_turned,
        num_documents=manifest.counts.documents,
        num_tokens=manifest.counts.tokens,
        bin_bytes=manifest.files["bin"].bytes,
        bin_sha256=manifest.files["bin"].sha256,
    )


def _check_without_manifest(prefix: str, direction: Direction, eod_id: int, vocab_size: int) -> CheckedDataset:
    header = read_index_header(Path(f"{prefix}.idx"))
    lengths = sequence_lengths(prefix)
    dtype = np.dtype(header.dtype)
    num_tokens, found_bytes = int(lengths.sum(dtype=np.int64)), Path(f"{prefix}.bin").stat().st_size
    if found_bytes != num_tokens * dtype.itemsize or num_tokens == 0:
        raise InputError(
            f"{prefix}.bin has {found_bytes:,} bytes, its index says {num_tokens:,} ids of {dtype}: the two files do "
            "not belong together, or one was cut off. Copy them again, or make them anew with tools/preprocess_data.py"
        )
    is_turned = direction is Direction.REVERSE
    if is_turned and header.num_boundaries != header.num_sequences + 1:
        raise InputError(
            f"{prefix} has {header.num_sequences:,} sequences in {header.num_boundaries - 1:,} documents (made "
            "with --split-sentences): read backwards, sentences would keep their order. Make it anew with "
            "tools/preprocess_data.py"
        )
    ids = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    _check_ids_fit(prefix, ids, vocab_size)
    is_closed = _ends_with(prefix, ids, lengths, eod_id)
    get_logger(__name__).warning(
        "warning: %s has no manifest: assumed to be forward, as Megatron's own tools write it, and of this run's "
        "tokenizer (a sample of its ids fits); documents %s the end-of-document id %d",
        *(prefix, "end with" if is_closed else "do not end with", eod_id),
    )
    return CheckedDataset(
        prefix=prefix,
        manifest=None,
        direction=Direction.FORWARD,
        is_closed=is_closed,
        is_turned=is_turned,
        num_documents=len(lengths),
        num_tokens=num_tokens,
        bin_bytes=found_bytes,
        bin_sha256=None,
    )


def sequence_lengths(prefix: str | Path) -> np.ndarray:
    """Map the lengths of a dataset's documents, in ids; int32 [documents].

    Raises:
        InputError: the index is no index, or truncated.
    """
    path = Path(f"{prefix}.idx")
    count = read_index_header(path).num_sequences
    if path.stat().st_size < HEADER.size + 4 * count:
        raise InputError(f"{path} is truncated: it lists {count:,} sequences and has {path.stat().st_size:,} bytes")
    if count == 0:
        return np.zeros(0, dtype=np.int32)
    return np.memmap(path, dtype=np.int32, mode="r", offset=HEADER.size, shape=(count,))


def _check_ids_fit(prefix: str, ids: np.ndarray, vocab_size: int) -> None:
    step = -(-len(ids) // SAMPLED_IDS)
    sample = ids[::step]
    if int(sample.max()) >= vocab_size or int(sample.min()) < 0:
        raise InputError(
            f"{prefix}.bin holds ids from {sample.min()} to {sample.max()} (a sample), the run's tokenizer has "
            f"{vocab_size}: it was made with another one. Use that tokenizer, or preprocess the text again"
        )


def _ends_with(prefix: str, ids: np.ndarray, lengths: np.ndarray, eod_id: int) -> bool:
    """Whether documents end with `eod_id`; the sample is the first and the last, and a thousand between."""
    ends = np.cumsum(lengths, dtype=np.int64)[lengths > 0] - 1
    sample = ends[np.linspace(0, len(ends) - 1, num=min(SAMPLED_DOCUMENTS, len(ends)), dtype=np.int64)]
    num_closed = int((ids[sample] == eod_id).sum())
    if 0 < num_closed < len(sample):
        raise InputError(
            f"{prefix} has no manifest, and {num_closed} of {len(sample)} sampled documents end with the "
            f"end-of-document id {eod_id}: nobody knows how it was made. Make it anew with "
            "tools/preprocess_data.py --append-eod"
        )
    return num_closed > 0


def _report(dataset: CheckedDataset) -> None:
    logger = get_logger(__name__)
    if dataset.is_turned:
        logger.info("%s: %s documents, read backwards", dataset.prefix, dataset.direction)
    if not dataset.is_closed:
        logger.warning(
            "warning: %s was made without --append-eod: documents run into each other, and the model "
            "cannot learn where one %s",
            dataset.prefix,
            "begins" if dataset.read_as is Direction.REVERSE else "ends",
        )


def _check_files_exist(prefix: str) -> None:
    missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
    if missing:
        likely = [p.with_suffix("") for p in sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*.idx"))]
        if prefix.endswith((".bin", ".idx")):
            likely = [Path(prefix).with_suffix("")]
        hint = f"; did you mean {likely[0]}?" if likely and str(likely[0]) != prefix else ""
        raise InputError(f"the dataset {prefix} is not there: no {' and no '.join(missing)}{hint}")


def _check_files_whole(prefix: str, manifest: Manifest) -> None:
    needed = manifest.files if manifest.pairs is None else manifest.files | {SIDECAR: manifest.sidecars[SIDECAR]}
    for suffix, expected in needed.items():
        path = Path(f"{prefix}.{suffix}")
        found_bytes = path.stat().st_size if path.is_file() else 0
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
