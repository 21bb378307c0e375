"""The steps of the quickstart: each runs the project's own tools, as a person would, and says what came out.

It owns the order of the steps and where their files lie in the run folder. The corpus is
`corpus.py`'s, running and timing is `runner.py`'s, the picture is `plots.py`'s.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus import choose_passages, fetch_shakespeare, read_jsonl, split_held_out
from runner import Runner, Step

from megatron_ledom.direction import Direction
from megatron_ledom.log import format_seconds
from megatron_ledom.testing import REPOSITORY, torchrun_command, train_bpe_tokenizer, write_jsonl

FAMOUS_LINES = (
    "To be, or not to be, that is the question:",
    "Exit, pursued by a bear.",
    "Good night, good night! parting is such sweet sorrow,",
)
LAMBDA = 0.5
SHOW_EVERY_S = 5.0
ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \|.*per iteration \(ms\): ([\d.]+).*lm loss: (\S+)")
VALIDATION = re.compile(r"validation loss at iteration (\d+).*lm loss value: (\S+)")


@dataclass(frozen=True)
class Settings:
    """What decides a run; written to settings.json, so that `--resume` continues with the same.

    Attributes:
        corpus: a JSONL file, or "" for Shakespeare's works from the package registry.
        vocab_size: entries of the tokenizer that is trained.
        first_iters: iterations on the first layout, TP=2 x PP=2.
        train_iters: iterations in all.
        num_texts: famous lines that something is written before.
        num_questions: passages that are reranked.
        num_candidates: continuations for each passage, one of them the true one.
    """

    corpus: str = ""
    vocab_size: int = 4096
    first_iters: int = 60
    train_iters: int = 400
    num_texts: int = 3
    num_questions: int = 100
    num_candidates: int = 8


class Quickstart:
    """The plan over one run folder."""

    def __init__(self, folder: Path, settings: Settings, runner: Runner, cache: Path) -> None:
        self.folder, self.settings, self._runner, self._cache = folder, settings, runner, cache
        self.train_jsonl, self.held_out_jsonl = folder / "corpus/train.jsonl", folder / "corpus/held_out.jsonl"
        self.tokenizer = folder / "tokenizer"

    def plan(self) -> list[Step]:
        """Every step, in order; the seconds were measured on two quiet cores."""
        forward, reverse = Direction.FORWARD, Direction.REVERSE
        first, last = self.settings.first_iters, self.settings.train_iters
        first_s, rest_s = 15 + 0.75 * first, 15 + 0.53 * (last - first)
        return [
            Step("corpus", "get a corpus and cut it into documents", self.get_corpus, 4),
            Step("tokenizer", "train a byte-level BPE tokenizer", self.train_tokenizer, 3),
            Step("preprocess-reverse", "text to reversed ids", lambda: self.preprocess(reverse), 5),
            Step("preprocess-forward", "text to forward ids, for the twin", lambda: self.preprocess(forward), 5),
            Step(
                "train-reverse", "train a tiny reverse model, TP=2 x PP=2", lambda: self.train_first(reverse), first_s
            ),
            Step("train-forward", "train its forward twin, TP=2 x PP=2", lambda: self.train_first(forward), first_s),
            Step(
                "resume-reverse",
                "resume the reverse model as DP=2, to the end",
                lambda: self.train_rest(reverse),
                rest_s,
            ),
            Step(
                "resume-forward",
                "resume the forward twin as DP=2, to the end",
                lambda: self.train_rest(forward),
                rest_s,
            ),
            Step("convert-reverse", "reverse checkpoint to Hugging Face", lambda: self.convert(reverse), 15),
            Step("convert-forward", "forward checkpoint to Hugging Face", lambda: self.convert(forward), 15),
            Step("write", "write what comes before famous lines", self.write_leftwards, 25),
            Step("rerank", "pick the true continuation by Reverse Reward", self.rerank, 15),
            Step("evaluate", f"loss on held-out text after {last} iterations", self.evaluate, 25),
            Step("plot", f"draw the loss curves (layouts change at {first})", self.plot, 5),
        ]

    def get_corpus(self) -> str:
        """Fetch or read the documents and split them."""
        corpus = self.settings.corpus
        documents = read_jsonl(Path(corpus)) if corpus else fetch_shakespeare(self._cache)
        train, held_out = split_held_out(documents)
        self.train_jsonl.parent.mkdir(exist_ok=True)
        write_jsonl(self.train_jsonl, train)
        write_jsonl(self.held_out_jsonl, held_out)
        size_mb = sum(map(len, train)) / 1e6
        return f"{len(train)} training documents ({size_mb:.1f} MB), {len(held_out)} held out"

    def train_tokenizer(self) -> str:
        """Train on the training documents alone."""
        train_bpe_tokenizer(read_jsonl(self.train_jsonl), self.settings.vocab_size, self.tokenizer)
        return f"vocabulary of {self.settings.vocab_size:,} in {self._relative(self.tokenizer)}"

    def preprocess(self, direction: Direction) -> str:
        """Run tools/preprocess_data.py."""
        (self.folder / "data").mkdir(exist_ok=True)
        output = self._tool(
            "preprocess_data.py",
            *("--input", self.train_jsonl, "--direction", direction, "--append-eod", "--overwrite"),
            *("--output-prefix", self.folder / "data" / direction, *self._tokenizer_flags()),
        )
        return output.splitlines()[1].strip()

    def train_first(self, direction: Direction) -> str:
        """Run tools/pretrain.py on four ranks, and stop on the way."""
        first = self.settings.first_iters
        layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
        return self._train(direction, 4, first, *layout, "--exit-interval", first)

    def train_rest(self, direction: Direction) -> str:
        """Run the same command on two ranks: it finds the checkpoint, and reads it at its own layout."""
        return self._train(direction, 2, self.settings.train_iters)

    def convert(self, direction: Direction) -> str:
        """Run tools/convert_to_hf.py; it compares logits with Megatron's before it reports success."""
        output = self.folder / "hf" / direction
        output.parent.mkdir(exist_ok=True)
        printed = self._tool(
            "convert_to_hf.py", "--load", self.folder / direction / "checkpoints", "--output", output, "--overwrite"
        )
        last_line = printed.strip().splitlines()[-1]
        return f"{self._relative(output)}: {last_line}" if str(output) not in last_line else last_line

    def write_leftwards(self) -> str:
        """Run tools/generate.py on each famous line and show one sample."""
        pages: list[str] = []
        for seed, line in enumerate(FAMOUS_LINES[: self.settings.num_texts], start=1):
            flags = ("--text", line, "--whole", "--max-new-tokens", 60, "--temperature", 0.8, "--seed", seed)
            text = self._tool("generate.py", "--model", self.folder / "hf/reverse", *flags).strip()
            pages.append(text)
            print("\n".join(f"          | {row}" for row in text.splitlines()), flush=True)
        path = self.folder / "written.txt"
        path.write_text("\n\n--------\n\n".join(pages) + "\n", encoding="utf-8")
        return f"{len(pages)} texts in {self._relative(path)}"

    def rerank(self) -> str:
        """Run tools/rerank.py on held-out passages: the true continuation among those of other passages.

        Forward scores compare different texts, so that a common one wins too often; the reverse score is of the same
        passage each time.
        """
        candidates, ranked = self.folder / "candidates.jsonl", self.folder / "ranked.jsonl"
        self._write_candidates(candidates)
        models = ("--reverse-model", self.folder / "hf/reverse", "--forward-model", self.folder / "hf/forward")
        scoring = ("--lambda", LAMBDA, "--normalize", "token", "--separator", "\n", "--overwrite")
        self._tool("rerank.py", "--input", candidates, "--output", ranked, *models, *scoring)
        records = [json.loads(line) for line in ranked.read_text(encoding="utf-8").splitlines()]
        scores: dict[str, Callable[[dict[str, float]], float]] = {
            "forward only": lambda c: c["forward_logprob"] / c["num_forward_tokens"],
            "reverse only": lambda c: c["reverse_logprob"] / c["num_reverse_tokens"],
            f"Reverse Reward (lambda {LAMBDA})": lambda c: c["reward"],
        }
        parts = []
        for name, score in scores.items():
            right = sum(max(r["candidates"], key=score)["is_true"] for r in records)
            parts.append(f"{name} {100 * right / len(records):.0f} %")
        chance = 100 / self.settings.num_candidates
        return f"true one first in {len(records)} questions: {', '.join(parts)}; chance {chance:.1f} %"

    def evaluate(self) -> str:
        """Run tools/evaluate_loss.py on the held-out documents: both twins and a unigram model."""
        losses = self.folder / "losses.json"
        models = ("--models", self.folder / "hf/reverse", self.folder / "hf/forward")
        data = ("--input", self.held_out_jsonl, "--train-data", self.folder / "data/reverse_text_document")
        table = self._tool("evaluate_loss.py", *models, *data, "--output", losses, "--overwrite")
        print("\n".join(f"          {row}" for row in table.strip().splitlines()), flush=True)
        record = json.loads(losses.read_text(encoding="utf-8"))
        named = {m["direction"]: m["loss_per_token"] for m in record["models"]}
        unigram = record["unigram"]["loss_per_token"]
        return f"nats/token: reverse {named['reverse']:.3f}, forward {named['forward']:.3f}, unigram {unigram:.3f}"

    def plot(self) -> str:
        """Draw both runs' curves from their TensorBoard files."""
        from plots import draw_losses

        losses = json.loads((self.folder / "losses.json").read_text(encoding="utf-8"))
        path = self.folder / "loss_curves.png"
        draw_losses(self.folder, path, self.settings.first_iters, losses["unigram"]["loss_per_token"])
        return str(self._relative(path))

    def _train(self, direction: Direction, num_ranks: int, until: int, *flags: object) -> str:
        command = torchrun_command(
            "pretrain.py",
            num_ranks,
            [
                *(
                    "--preset",
                    "tiny",
                    "--device",
                    "cpu",
                    "--direction",
                    direction,
                    "--run-dir",
                    self.folder / direction,
                ),
                *("--data-path", self.folder / "data" / f"{direction}_text_document", *self._tokenizer_flags()),
                *("--train-iters", self.settings.train_iters, *flags),
            ],
        )
        progress = TrainingProgress(until)
        self._runner.command(command, show=progress)
        return f"iteration {until}: training loss {progress.loss:.3f}{progress.validation_loss}"

    def _tool(self, tool: str, *arguments: object) -> str:
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        return self._runner.command([sys.executable, REPOSITORY / "tools" / tool, *arguments], environment=threads)

    def _tokenizer_flags(self) -> Sequence[object]:
        return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer)

    def _write_candidates(self, path: Path) -> None:
        passages = choose_passages(read_jsonl(self.held_out_jsonl), self.settings.num_questions)
        rng = random.Random(0)
        records = []
        for passage in passages:
            others = [p.continuation for p in passages if p.continuation != passage.continuation]
            wrong = rng.sample(others, min(self.settings.num_candidates - 1, len(others)))
            options = [{"text": passage.continuation, "is_true": True}]
            options += [{"text": text, "is_true": False} for text in wrong]
            rng.shuffle(options)
            records.append({"question": passage.given, "candidates": options})
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")

    def _relative(self, path: Path) -> Path:
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class TrainingProgress:
    """Turns Megatron's log lines into a line of progress every few seconds, and keeps the last losses."""

    def __init__(self, until: int) -> None:
        self.loss = float("nan")
        self.validation_loss = ""
        self._until = until
        self._last_shown = 0.0

    def __call__(self, line: str) -> str | None:
        """Return what to show for a line of Megatron's output, if anything."""
        validation = VALIDATION.search(line)
        if validation:
            self.validation_loss = f", validation loss {float(validation[2]):.3f}"
        match = ITERATION.search(line)
        if not match:
            return None
        iteration, step_ms, self.loss = int(match[1]), float(match[3]), float(match[4])
        if time.monotonic() - self._last_shown < SHOW_EVERY_S and iteration < self._until:
            return None
        self._last_shown = time.monotonic()
        left = format_seconds(max(self._until - iteration, 0) * step_ms / 1000)
        return f"iteration {iteration}/{self._until}, loss {self.loss:.3f}, {step_ms:.0f} ms each, {left} left"
