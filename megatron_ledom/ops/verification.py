"""Which CUDA kernels have been verified on which GPU: the record that `tools/verify_kernels.py` writes.

A record is of one build (the hash of the kernels' sources and flags, and the compiler), one kind of GPU and one driver:

    {"format": 1, "source": "3f..", "compiler": "nvcc 13.0.88", "gpu": "NVIDIA H100 80GB HBM3", "capability": 90,
     "driver": "580.159.04", "parts": {"sm80": {"passed": true, ...}, "rope": {"passed": true, ...}}, ...}

It lies in the folder that LEDOM_VERIFICATION names, or in $XDG_CACHE_HOME/megatron_ledom/verification (~/.cache
without it): never in the package, which may be read-only and shared by machines. A record that differs in any of these
facts, or cannot be read, verifies nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import OutputError
from megatron_ledom.ops.gpu import Gpu

FORMAT = 1
FOLDER_VARIABLE = "LEDOM_VERIFICATION"
TOOL = "tools/verify_kernels.py"
ROPE = "rope"
"""The part of a record that is about rotary positions; the others have the names of the attention variants."""


@dataclass(frozen=True)
class Build:
    """The CUDA kernels that were compiled: `source` is the SHA-256 of all that they are made from."""

    source: str
    compiler: str


def record_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where records lie."""
    found = os.environ if environment is None else environment
    if folder := found.get(FOLDER_VARIABLE):
        return Path(folder)
    cache = found.get("XDG_CACHE_HOME") or Path(found.get("HOME", "~")).expanduser() / ".cache"
    return Path(cache) / "megatron_ledom" / "verification"


def record_path(folder: Path, build: Build, gpu: Gpu) -> Path:
    """The file of one build, kind of GPU and driver."""
    words = f"{gpu.name} {gpu.capability} driver {gpu.driver} source {build.source[:16]}"
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", words) + ".json")


def facts(build: Build, gpu: Gpu) -> dict[str, object]:
    """What must be the same for a record to count."""
    return {
        "format": FORMAT,
        "source": build.source,
        "compiler": build.compiler,
        "gpu": gpu.name,
        "capability": gpu.capability,
        "driver": gpu.driver,
    }


def find_fault(folder: Path, build: Build, gpu: Gpu, part: str) -> str | None:
    """Why a part of a build is not verified on a GPU; None where it is."""
    path = record_path(folder, build, gpu)
    advice = f"run {TOOL} on this GPU"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"not verified on {gpu.name} with driver {gpu.driver} for this build (no {path}): {advice}"
    except (OSError, ValueError) as error:
        return f"its record {path} cannot be read ({error}): {advice}"
    wanted = facts(build, gpu)
    found = {name: record.get(name) for name in wanted} if isinstance(record, dict) else {}
    if different := [name for name in wanted if found.get(name) != wanted[name]]:
        return f"its record {path} is of another {', '.join(different)}: {advice}"
    parts = record.get("parts")
    entry = parts.get(part) if isinstance(parts, dict) else None
    if not isinstance(entry, dict) or entry.get("passed") is not True:
        said = "; ".join(map(str, entry.get("faults") or [])) if isinstance(entry, dict) else ""
        return f"its verification on this GPU failed{': ' + said if said else ''} ({path})"
    return None


def write_record(folder: Path, build: Build, gpu: Gpu, parts: Mapping[str, Mapping[str, Any]], **more: Any) -> Path:
    """Write a record; it is complete or not there.

    Args:
        folder: made if absent.
        build: which kernels.
        gpu: where they ran.
        parts: variant, or `ROPE` -> {"passed": bool, "faults": [...], ...}.
        more: further facts, for people.

    Raises:
        OutputError: the file system refuses.
    """
    path = record_path(folder, build, gpu)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    record = facts(build, gpu) | {"parts": {name: dict(part) for name, part in parts.items()}} | more
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"the record {path} cannot be written: {error}; set {FOLDER_VARIABLE} to a folder") from error
    return path
