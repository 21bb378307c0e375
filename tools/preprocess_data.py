"""Text to Megatron's .bin/.idx datasets, ids reversed (or not), with a manifest that says so."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ledom.errors import run_cli

if TYPE_CHECKING:
    from megatron_ledom.data.manifest import Manifest

EXAMPLE = """example:
  python tools/preprocess_data.py --input corpus.jsonl --tokenizer-type HuggingFaceTokenizer \\
      --tokenizer-model tokenizer/ --output-prefix data/corpus --append-eod --workers 8
writes data/corpus_text_document.bin, .idx and what they are; train on them with
  --data-path data/corpus_text_document. A killed run goes on with the same command.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags that Megatron's own tool has are called and mean the same."""
    from megatron_ledom.direction import Direction

    parser = argparse.ArgumentParser(
        prog="preprocess_data.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = parser.add_argument_group("input")
    text.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="JSONL (.gz, .zst), parquet and .txt files, folders of them, globs; in this order",
    )
    text.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields or columns (text)")
    text.add_argument("--text-unit", default="file", help="a document of a .txt: file, line or paragraph (file)")
    text.add_argument("--on-bad-record", choices=["fail", "skip"], default="fail", help="skip lists them (fail)")
    text.add_argument("--max-bad-records", type=int, metavar="N", help="fail when more are skipped")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, help="HuggingFaceTokenizer, Llama2Tokenizer, ...")
    tokenizer.add_argument("--tokenizer-model", help="folder with tokenizer.json, or a SentencePiece .model file")
    tokenizer.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument(
        "--tokenizer-backend", default="auto", help="auto (the fastest exact one), gigatoken, tokenizers, sentencepiece"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.*")
    output.add_argument(
        "--direction",
        choices=[str(d) for d in Direction],
        default=str(Direction.REVERSE),
        help="order of the ids in the files (reverse)",
    )
    output.add_argument("--reverse-unit", default="token", help="token, or sentence: last to first, tokens in order")
    output.add_argument("--punkt", default="train", metavar="FILE", help="where sentences end; learnt if not given")
    output.add_argument("--append-eod", action="store_true", help="close every document with the end-of-document id")
    output.add_argument("--overwrite", action="store_true", help="replace datasets, and unfinished work, of this name")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one for each usable core)"
    )
    work.add_argument("--shard-mb", type=float, metavar="MB", help="input in a shard (4 to 256, by the corpus)")
    work.add_argument("--shard-index", type=int, metavar="I", help="do share I, from 0, of the work and stop")
    work.add_argument("--num-shards", type=int, metavar="N", help="shares; join them with tools/merge_data.py")
    return parser


def main(argv: list[str]) -> int:
    """Preprocess, then print what was written."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # workers are forked, and only a process of one thread can be
    args = build_parser().parse_args(argv)
    from megatron_ledom.data.tokenizer_process import load_aside
    from megatron_ledom.direction import Direction

    start = time.monotonic()
    named = (args.tokenizer_type, args.tokenizer_model, args.vocab_file, args.merge_file)
    with load_aside(*named) as tokenizer:  # it loads while numpy and the rest are imported
        from megatron_ledom.data.preprocess import PreprocessConfig, preprocess

        fields = vars(args) | {"inputs": args.input, "direction": Direction(args.direction)}
        del fields["input"]
        config = PreprocessConfig(**fields)
        manifests = preprocess(config, tokenizer)
        elapsed_s = time.monotonic() - start
    if not manifests:
        print(f"share {args.shard_index} of {args.num_shards} is done; then: tools/merge_data.py {args.output_prefix}")
    for prefix, manifest in zip(config.prefixes, manifests, strict=False):
        print(summary(prefix, manifest, elapsed_s))
    return 0


def summary(prefix: str, manifest: Manifest, elapsed_s: float) -> str:
    """Return what was written in a few lines."""
    counts, tokenizer = manifest.counts, manifest.tokenizer
    size_mb = sum(f.bytes for f in manifest.files.values()) / 1e6
    end = f"closed by id {tokenizer.eod_id}" if manifest.append_eod else "without end-of-document id"
    return (
        f"{prefix}.bin .idx .manifest.json: {size_mb:,.1f} MB\n"
        f"  {counts.documents:,} documents, {counts.tokens:,} tokens of {manifest.dtype}, {manifest.direction}, {end}\n"
        f"  {counts.text_bytes / 1e6:,.1f} MB of text, {counts.text_bytes / counts.tokens:.2f} bytes a token, "
        f"{counts.empty_documents:,} empty documents and {counts.bad_records:,} bad records left out\n"
        f"  {tokenizer.type}, vocabulary {tokenizer.vocab_size:,}, {tokenizer.fingerprint[:23]}, "
        f"tokenised by {tokenizer.backend}\n"
        f"  {elapsed_s:.1f} s, {counts.tokens / elapsed_s:,.0f} tokens/s, "
        f"{counts.text_bytes / 1e6 / elapsed_s:.1f} MB/s"
    )


if __name__ == "__main__":
    run_cli(main)
