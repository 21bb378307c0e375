"""What `inspection` found, in words for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_MAX_ARGUMENTS = 40


def inspection_text(found: dict[str, Any]) -> str:
    """Word a result of `inspection.inspect`."""
    lines: list[str] = []
    if "kind" in found:
        lines += _description(found)
    if "tensors" in found:
        lines += ["", *_table(found["tensors"])]
    if "verify" in found:
        lines += ["", *_verify(found["verify"])]
    if "diff" in found:
        lines += ["", *_diff(found["diff"])]
    return "\n".join(_printable(line) for line in lines)


def _description(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['folder']}: {found['kind']}"
    tokenizer = found["tokenizer"]
    named = " ".join(str(tokenizer[key]) for key in ("type", "model") if tokenizer.get(key))
    rows = [
        ("step", found["step"]),
        ("direction", found["direction"] or "not said"),
        ("preset", found.get("preset")),
        ("tokenizer", named or None),
        ("fingerprint", tokenizer.get("fingerprint") or "not said"),
        ("dtype", found["dtype"]),
        ("parameters", f"{found['num_parameters']:,}"),
    ]
    if "layout" in found:
        layout = {short: found["layout"].get(name) for short, name in _LAYOUT}
        rows.append(("saved at", " x ".join(f"{short} {size}" for short, size in layout.items() if size)))
        form = found["format"]
        rows.append(("format", f"{form.get('sharded_backend')} {form.get('sharded_backend_version')}"))
    for name, group in found["groups"].items():
        text = f"{group['tensors']} tensors, {group['elements']:,} elements, {_size(group['bytes'])}"
        rows.append((name, f"{text}, {', '.join(group['dtypes'])}"))
    rows.append(("on disk", f"{_size(found['bytes_on_disk'])} in {found['num_files']} files"))
    listed = found["checksums"]
    rows.append(("checksums", "none" if listed is None else f"of {listed} files; compare them with --verify"))
    yield from (f"  {name:<12} {value}" for name, value in rows if value is not None)
    yield "  model"
    yield from (f"    {name:<36} {value}" for name, value in found["model"].items() if value is not None)


_LAYOUT = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("DP", "data_parallel_size"),
    ("CP", "context_parallel_size"),
)


def _table(tensors: list[dict[str, Any]]) -> Iterator[str]:
    width = max((len(row["name"]) for row in tensors), default=4)
    yield f"{'name':<{width}}  {'shape':<22} {'dtype':<9} {'bytes':>16} {'chunks':>7}"
    for row in tensors:
        shape = str(row["shape"])
        yield f"{row['name']:<{width}}  {shape:<22} {row['dtype']:<9} {row['bytes']:>16,} {row['chunks']:>7}"


def _verify(verify: dict[str, Any]) -> Iterator[str]:
    if not verify["has_checksums"]:
        yield "verify: no checksums were written beside it, so files can only be read, not compared"
    if verify["faults"]:
        yield f"verify: {len(verify['faults'])} faults"
        yield from (f"  {fault}" for fault in verify["faults"])
    else:
        yield "verify: every tensor can be read" + (", every file is as it was saved" * verify["has_checksums"])


def _diff(diff: dict[str, Any]) -> Iterator[str]:
    yield f"compared with {diff['other']}: {'equal, bit for bit' if diff['is_equal'] else 'DIFFERENT'}"
    yield from (f"  only in the first: {name}" for name in diff["only_first"])
    yield from (f"  only in the second: {name}" for name in diff["only_second"])
    for what in ("shapes", "dtypes"):
        yield from (f"  {name}: {what} {one} and {other}" for name, (one, other) in diff[what].items())
    changed = {name: value for name, value in diff["values"].items() if not value["bitwise_equal"]}
    yield f"  tensors equal bit for bit: {len(diff['values']) - len(changed)} of {len(diff['values'])}"
    if changed:
        width = max(map(len, changed))
        yield f"  {'name':<{width}}  {'largest difference':>18}  {'relative (Frobenius)':>20}"
    for name, value in changed.items():
        yield f"  {name:<{width}}  {value['max_abs_difference']:>18.6g}  {value['relative_frobenius']:>20.3g}"
    if diff["arguments"]:
        yield f"  arguments that differ: {len(diff['arguments'])}"
    shown = list(diff["arguments"].items())[:_MAX_ARGUMENTS]
    yield from (f"    {name}: {_short(one)} | {_short(other)}" for name, (one, other) in shown)
    if len(shown) < len(diff["arguments"]):
        yield f"    and {len(diff['arguments']) - len(shown)} more (--json lists all)"


def _printable(line: str) -> str:
    """Show control characters as escapes: a name in a checkpoint must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _size(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes ({num_bytes / 1e9:.2f} GB)" if num_bytes >= 10**7 else f"{num_bytes:,} bytes"
