"""What stands under the final names of a run's datasets, and whose it is.

A run may be killed after it has published and before it has cleared up, and another process may join
the same plan meanwhile; `merge.py` asks here which of it has happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ledom.data.manifest import Manifest, load_manifest, manifest_hash, manifest_path
from megatron_ledom.data.shards import WorkFolder
from megatron_ledom.errors import OutputExistsError

SUFFIXES = (".bin", ".idx", ".crc32", ".skipped.jsonl", ".sentences", ".pairs", ".punkt.json", ".manifest.json")


def dataset_prefixes(output_prefix: str, json_keys: Sequence[str]) -> list[str]:
    """The datasets of a run, in the order of the keys; Megatron's names."""
    return [f"{output_prefix}_{key}_document" for key in json_keys]


def check_not_there(prefixes: Sequence[str]) -> None:
    """Raise OutputExistsError where a file of one of the datasets is there."""
    existing = [path for prefix in prefixes for s in SUFFIXES if Path(path := f"{prefix}{s}").exists()]
    if existing:
        raise OutputExistsError(f"{existing[0]} exists; choose another --output-prefix or pass --overwrite")


def finish_publishing(work: WorkFolder, prefixes: Sequence[str]) -> list[Manifest] | None:
    """Return the manifests, and clear up, where a run of the plan that `work` has adopted was killed after publishing.

    None elsewhere; also where more records are bad than this run allows, which joining again tells.
    """
    work.sweep()
    if not work.is_publishing or not all(manifest_path(prefix).exists() for prefix in prefixes):
        return None
    manifests = [load_manifest(prefix) for prefix in prefixes]
    if [manifest_hash(manifest) for manifest in manifests] != work.publishing_hashes():
        return None  # those of an older dataset, which was to be replaced
    if max(manifest.counts.bad_records for manifest in manifests) > (work.adopted["max_bad_records"] or 0):
        return None
    work.remove()
    return manifests


def standing_manifests(prefixes: Sequence[str]) -> list[bytes | None]:
    """Return the manifests that stand under these names now, as they are; None for one that does not."""
    paths = map(manifest_path, prefixes)
    return [path.read_bytes() if path.is_file() else None for path in paths]


def joined_meanwhile(
    work: WorkFolder, prefixes: Sequence[str], before: Sequence[bytes | None], fingerprint: str | None
) -> list[Manifest] | None:
    """Return the manifests where another process has joined the adopted plan and removed its folder; None elsewhere.

    Args:
        work: the folder.
        prefixes: of the datasets.
        before: what `standing_manifests` gave when this process began.
        fingerprint: of the tokenizer; None where it was not known yet, and so nothing was joined.
    """
    now = standing_manifests(prefixes)
    if work.path.exists() or any(new is None or new == old for new, old in zip(now, before, strict=True)):
        return None
    if fingerprint is None:
        return None
    tokenizer = described_tokenizer(work.adopted, fingerprint)
    manifests = [load_manifest(prefix) for prefix in prefixes]
    are_ours = (_is_of(work.adopted, tokenizer, key, manifest) for key, manifest in enumerate(manifests))
    return manifests if all(are_ours) else None


def described_tokenizer(plan: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What the manifests of a plan say of its tokenizer: what it is, not how its files are written."""
    said = plan["tokenizer"] | {"fingerprint": fingerprint}
    return {name: value for name, value in said.items() if name != "files_sha256"}


def _is_of(plan: dict[str, Any], made_with: dict[str, Any], key: int, manifest: Manifest) -> bool:
    """Whether a manifest says of its dataset what the plan says of the one that is made of its key `key`."""
    tokenizer = asdict(manifest.tokenizer)
    del tokenizer["backend"]
    said = {
        "sources": [[source.path, source.bytes, source.format] for source in manifest.sources],
        "tokenizer": tokenizer,
        "pairs": None if manifest.pairs is None else asdict(manifest.pairs),
    }
    said |= {name: getattr(manifest, name) for name in ("dtype", "direction", "reverse_unit", "append_eod", "json_key")}
    sources = [[source["path"], source["bytes"], source["format"]] for source in plan["sources"]]
    meant = plan | {"sources": sources, "tokenizer": made_with, "json_key": plan["json_keys"][key]}
    return all(meant[name] == value for name, value in said.items())
