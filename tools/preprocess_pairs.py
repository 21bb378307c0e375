"""Questions and answers to a dataset for fine-tuning, with the loss on the wanted part only."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from megatron_ledom.errors import run_cli

EXAMPLE = """example, for a scorer of log P(question given answer):
  python tools/preprocess_pairs.py --input train.jsonl --output-prefix data/train --max-tokens 512 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer/
writes data/train_pairs_document.bin and what belongs to it; train on it with tools/pretrain.py
  --data-path data/train_pairs_document. The separator must be the one that tools/rerank.py or tools/score.py gets.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    from megatron_ledom.direction import Direction

    parser = argparse.ArgumentParser(
        prog="preprocess_pairs.py",
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
        help="JSONL (.gz, .zst) and parquet files, folders of them, globs; in this order",
    )
    text.add_argument("--question-key", default="question", metavar="KEY", help="field of the question (question)")
    text.add_argument("--answer-key", default="answer", metavar="KEY", help="field of the answer (answer)")
    text.add_argument("--separator", default="", help="put between the two, e.g. $'\\n'; read, never learnt (nothing)")
    text.add_argument(
        "--max-tokens", type=int, metavar="N", help="a longer pair is a bad record; give the --seq-length of training"
    )
    text.add_argument("--on-bad-record", choices=["fail", "skip"], default="fail", help="skip lists them (fail)")
    text.add_argument("--max-bad-records", type=int, metavar="N", help="fail when more are skipped")
    tokenizer = parser.add_argument_group("tokenizer, as for preprocess_data.py")
    tokenizer.add_argument("--tokenizer-type", required=True, help="HuggingFaceTokenizer, Llama2Tokenizer, ...")
    tokenizer.add_argument("--tokenizer-model", help="folder with tokenizer.json, or a SentencePiece .model file")
    tokenizer.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    tokenizer.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    tokenizer.add_argument("--tokenizer-backend", default="auto", help="auto, gigatoken, tokenizers, sentencepiece")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_pairs_document.*")
    output.add_argument(
        "--direction",
        choices=[str(d) for d in Direction],
        default=str(Direction.REVERSE),
        help="of the model that will be trained (reverse)",
    )
    output.add_argument(
        "--loss-on",
        choices=["question", "answer", "both"],
        help="what the model learns (the part that it reads last: the question in reverse, the answer in forward)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace a dataset, and unfinished work, of this name")
    output.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one for each usable core)"
    )
    return parser


def main(argv: list[str]) -> int:
    """Preprocess, then print what was written."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # workers are forked, and only a process of one thread can be
    args = build_parser().parse_args(argv)
    from megatron_ledom.data.manifest import PairRecord
    from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
    from megatron_ledom.direction import Direction

    fields = vars(args) | {"inputs": args.input, "direction": Direction(args.direction), "append_eod": True}
    question, answer, separator = (fields.pop(name) for name in ("question_key", "answer_key", "separator"))
    last = "question" if fields["direction"] is Direction.REVERSE else "answer"
    pairs = PairRecord(question, answer, separator, fields.pop("loss_on") or last)
    del fields["input"]
    config = PreprocessConfig(**fields, json_keys=(question, answer), pairs=pairs)
    start = time.monotonic()
    (manifest,) = preprocess(config)
    counts = manifest.counts
    print(
        f"{config.prefixes[0]}: {counts.documents:,} pairs, {counts.tokens:,} tokens, {manifest.direction}, "
        f"loss on {pairs.loss_on}; {counts.bad_records:,} bad records left out; {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
