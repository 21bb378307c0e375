"""Whether two tokenizers are the same: by what decides ids (its fingerprint), or by the files they were read from.

The fingerprint is what manifests and checkpoints keep: it holds wherever the files lie and however they are written.
To make it takes a tenth of a second for a large vocabulary; the hash of the files none, and it serves a run that
goes on where another was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ledom.errors import InputError

FINGERPRINT_VERSION = 1


def files_sha256(files: Iterable[Path]) -> str:
    """Return a SHA-256 of files, their names and order included, in hex.

    Raises:
        InputError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path} again, of which the tokenizer was made: {error.strerror}") from error
        digest.update(json.dumps([path.name, len(content)]).encode("ascii") + content)
    return digest.hexdigest()


def canonical(content: dict[str, Any]) -> dict[str, Any]:
    """Return what decides ids in a `tokenizer.json`, so that writing the same tokenizer again changes nothing.

    Left out: truncation, padding, decoder and post-processor (they act after ids are made, or
    not at all here), and everything null, false or empty, which older files do not write at all.
    """
    model = dict(content["model"])
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.pop("merges", [])]
    vocab = model.pop("vocab")
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    added = [
        {"id": t["id"], "content": t["content"]} | {f: True for f in flags if t[f]} for t in content["added_tokens"]
    ]
    return {
        "vocab": vocab,
        "merges": merges,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "model": _without_blanks(model),
        "normalizer": _without_blanks(content.get("normalizer")),
        "pre_tokenizer": _without_blanks(content.get("pre_tokenizer")),
    }


def _without_blanks(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: _without_blanks(v) for k, v in value.items() if k != "trim_offsets"}
        return {k: v for k, v in kept.items() if v is not None and v is not False and v not in ("", [], {})}
    if isinstance(value, list):
        return [_without_blanks(v) for v in value]
    return value


def fingerprint_of(facts: dict[str, Any]) -> str:
    """Return "sha256:..." of facts that decide ids."""
    text = json.dumps({"version": FINGERPRINT_VERSION} | facts, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()
