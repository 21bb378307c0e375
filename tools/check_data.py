"""Verify a dataset to the last byte, or show one of its documents.

Exit status: 0 sound, 1 faults were found, 2 it cannot be read at all.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from megatron_ledom.errors import run_cli

if TYPE_CHECKING:
    from megatron_ledom.data.manifest import Manifest
    from megatron_ledom.data.tokenizers import Tokenizer


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(prog="check_data.py", description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="path without suffix, as in --data-path")
    parser.add_argument("--show", type=int, metavar="N", help="show document N, counted from 0, instead of verifying")
    parser.add_argument("--tokenizer-type", help="compare with this tokenizer (and show texts with it)")
    parser.add_argument("--tokenizer-model", help="as for tools/preprocess_data.py")
    parser.add_argument("--vocab-file", help="as for tools/preprocess_data.py")
    parser.add_argument("--merge-file", help="as for tools/preprocess_data.py")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: list[str]) -> int:
    """Verify or show."""
    args = build_parser().parse_args(argv)
    tokenizer = None
    if args.tokenizer_type is not None:
        from megatron_ledom.data.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(
            args.tokenizer_type, args.tokenizer_model, vocab_file=args.vocab_file, merge_file=args.merge_file
        )
    return verify(args.prefix, tokenizer, args.json) if args.show is None else show(args, tokenizer)


def verify(prefix: str, tokenizer: Tokenizer | None, as_json: bool) -> int:
    """Check every byte and print what was found."""
    from megatron_ledom.data.check import check_dataset
    from megatron_ledom.data.manifest import load_manifest
    from megatron_ledom.log import Progress

    files = load_manifest(prefix)
    total = sum(f.bytes for f in (files.files | files.sidecars).values()) + files.files["bin"].bytes
    progress = Progress("check", total / 1e6, "MB")
    report = check_dataset(prefix, tokenizer, lambda num_bytes: progress.update(num_bytes / 1e6))
    progress.close()
    manifest, is_sound = report.manifest, not report.faults
    assert manifest is not None
    if as_json:
        found = {"prefix": prefix, "is_sound": is_sound, "faults": report.faults}
        print(json.dumps(found | {"documents": report.documents, "tokens": report.tokens}, indent=2))
        return int(not is_sound)
    print(*report.faults, sep="\n", end="\n" if report.faults else "")
    if is_sound:
        compared = "of the given tokenizer" if tokenizer is not None else f"made with {manifest.tokenizer.type}"
        print(
            f"{prefix} is sound: {report.documents:,} documents, {report.tokens:,} tokens, {manifest.direction} "
            f"({manifest.reverse_unit}), {compared}"
        )
    return int(not is_sound)


def show(args: argparse.Namespace, tokenizer: Tokenizer | None) -> int:
    """Print one document in reading order and as it is stored."""
    from megatron_ledom.data.documents import read_document
    from megatron_ledom.data.manifest import load_manifest

    manifest = load_manifest(args.prefix)
    document = read_document(args.prefix, manifest, args.show)
    tokenizer = tokenizer or recorded_tokenizer(manifest)
    orders: dict[str, Any] = {"reading order": document.natural, "as stored": document.stored}
    shown = {
        name: {"ids": ids.tolist(), "text": None if tokenizer is None else tokenizer.decode(ids)}
        for name, ids in orders.items()
    }
    if args.json:
        print(json.dumps({"document": args.show, "origin": document.origin, **shown}, ensure_ascii=False, indent=2))
        return 0
    print(f"document {args.show} of {args.prefix}, from {document.origin}")
    for name, content in shown.items():
        text = "(give --tokenizer-type and its files to see the text)" if content["text"] is None else content["text"]
        print(f"--- {name}: {len(content['ids']):,} ids\n{' '.join(map(str, content['ids']))}\n{text}")
    return 0


def recorded_tokenizer(manifest: Manifest) -> Tokenizer | None:
    """Load the tokenizer from where the manifest says that it lay, if it is still there and the same."""
    from megatron_ledom.data.tokenizers import load_tokenizer
    from megatron_ledom.errors import LedomError

    try:
        tokenizer = load_tokenizer(manifest.tokenizer.type, manifest.tokenizer.model)
    except LedomError:
        return None
    return tokenizer if tokenizer.fingerprint == manifest.tokenizer.fingerprint else None


if __name__ == "__main__":
    run_cli(main)
