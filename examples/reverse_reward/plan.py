"""The steps of the experiment: each runs the project's own tools, as a person would, and says what came out.

It owns the order of the steps and where their files lie. The problems are `problems.py`'s; running, timing and
resuming is the quickstart's `runner.py`, whose folder `experiment.py` puts on the path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from problems import SEPARATOR, read_problems, write_problems
from runner import Runner, Step
from settings import Settings
from steps import TrainingProgress

from megatron_ledom.direction import Direction
from megatron_ledom.testing import REPOSITORY, torchrun_command, train_bpe_tokenizer, write_jsonl

TOKENIZER_SAMPLE = 20_000  # problems that the tokenizer is trained on
CONTEXT_TOKENS = 256  # of the preset `tiny`; the longest problem with its solution has about 165


class Experiment:
    """The plan over one folder."""

    def __init__(self, folder: Path, settings: Settings, seeds: list[int], runner: Runner, jobs: int) -> None:
        self.folder, self.settings, self.seeds, self._runner, self._jobs = folder, settings, seeds, runner, jobs
        self.data = folder / "data"
        self.tokenizer = folder / "tokenizer"

    def plan(self) -> list[Step]:
        """Every step, in order; the seconds were measured on one of two busy cores."""
        steps = [
            Step("problems", "draw problems and train the tokenizer", self.draw, 20),
            Step("preprocess", "text to reversed ids, pairs for the fine-tuning", self.preprocess, 10),
        ]
        for seed in self.seeds:
            steps += self._plan_seed(seed)
        title = "compare every way of choosing, over all seeds"
        return [*steps, Step(f"evaluate-{self._seed_names}", title, self.evaluate, 15 * len(self.seeds))]

    def _plan_seed(self, seed: int) -> list[Step]:
        def of(work: Callable[[int], str]) -> Callable[[], str]:
            return lambda: work(seed)

        iters, tune = self.settings.train_iters, self.settings.tune_iters
        num_answers = self.settings.num_problems * (self.settings.num_samples + 1)
        return [
            Step(f"twins-{seed}", f"seed {seed}: train forward and reverse twin", of(self.train_twins), 0.9 * iters),
            Step(f"convert-{seed}", f"seed {seed}: twins to Hugging Face", of(self.convert_twins), 30),
            Step(f"sample-{seed}", f"seed {seed}: answer the unseen problems", of(self.sample), 0.03 * num_answers),
            Step(f"tune-{seed}", f"seed {seed}: fine-tune the reverse twin on questions", of(self.tune), 0.5 * tune),
            Step(f"rank-{seed}", f"seed {seed}: score all answers", of(self.rank), 0.03 * num_answers),
        ]

    def draw(self) -> str:
        """Draw all problems and write the twins' text."""
        self.data.mkdir(exist_ok=True)
        s = self.settings
        counts = {"training": s.num_training, "tuning": s.num_tuning, "problems": s.num_problems}
        write_problems(self.data, counts, s.largest_number, s.longest_chars)
        texts = [p.question + SEPARATOR + p.solution for p in read_problems(self.data / "training.jsonl")]
        write_jsonl(self.data / "text.jsonl", texts)
        train_bpe_tokenizer(texts[:TOKENIZER_SAMPLE], s.vocab_size, self.tokenizer, single_digits=True)
        return ", ".join(f"{count:,} {name}" for name, count in counts.items())

    def preprocess(self) -> str:
        """Run tools/preprocess_data.py; the forward twin reads the same file backwards."""
        output = self._tool(
            "preprocess_data.py",
            *("--input", self.data / "text.jsonl", "--output-prefix", self.data / "reverse"),
            *("--append-eod", "--overwrite", *self._tokenizer_flags()),
        )
        pairs = self._tool(
            "preprocess_pairs.py",
            *("--input", self.data / "tuning.jsonl", "--answer-key", "solution", "--separator", SEPARATOR),
            *("--output-prefix", self.data / "tuning", "--max-tokens", CONTEXT_TOKENS, "--overwrite"),
            *self._tokenizer_flags(),
        )
        return f"{output.splitlines()[1].strip()}; {pairs.strip().splitlines()[-1].partition(': ')[2]}"

    def train_twins(self, seed: int) -> str:
        """Run tools/pretrain.py in both directions, at the same time where there are cores for it."""
        with ThreadPoolExecutor(self._jobs) as pool:
            results = list(pool.map(lambda direction: self._train(seed, direction), Direction))
        return "; ".join(results)

    def convert_twins(self, seed: int) -> str:
        """Run tools/convert_to_hf.py on both."""
        for direction in Direction:
            self._convert(seed, direction)
        return f"{self._of(seed)}/hf"

    def sample(self, seed: int) -> str:
        """Run tools/sample_answers.py with the forward twin."""
        s = self.settings
        printed = self._tool(
            "sample_answers.py",
            *("--model", self._of(seed) / "hf/forward", "--input", self.data / "problems.jsonl"),
            *("--output", self._of(seed) / "candidates.jsonl", "--separator", SEPARATOR, "--overwrite"),
            *("--num-samples", s.num_samples, "--temperature", s.temperature, "--seed", 1000 * seed),
            *("--max-new-tokens", s.answer_tokens, "--batch-rows", 256),
        )
        return printed.strip().rpartition(": ")[2]

    def tune(self, seed: int) -> str:
        """Run tools/pretrain.py on the reverse twin's weights, with the loss on the questions; then export it."""
        s = self.settings
        progress = TrainingProgress(s.tune_iters)
        self._runner.command(
            torchrun_command(
                "pretrain.py",
                1,
                [
                    *("--preset", "tiny", "--device", "cpu", "--seed", seed, "--run-dir", self._of(seed) / "scorer"),
                    *("--pretrained-checkpoint", self._of(seed) / "reverse/checkpoints", "--pack-pairs"),
                    *("--data-path", self.data / "tuning_pairs_document"),
                    *(*self._tokenizer_flags(), *s.model_flags()),
                    *("--micro-batch-size", s.batch, "--global-batch-size", s.batch, "--train-iters", s.tune_iters),
                    *("--lr", 3e-4, "--min-lr", 3e-5, "--eval-interval", 500, "--save-interval", 500),
                ],
            ),
            show=progress,
        )
        self._convert(seed, "scorer")
        return f"loss on questions {progress.loss:.3f}{progress.validation_loss}"

    def rank(self, seed: int) -> str:
        """Run tools/rerank.py with the fine-tuned scorer, and again with the reverse twin as it was before."""
        folder = self._of(seed)
        flags = ("--separator", SEPARATOR, "--overwrite")
        forward = ("--forward-model", folder / "hf/forward", "--input", folder / "candidates.jsonl")
        tuned, untuned = folder / "ranked.jsonl", folder / "ranked-untuned.jsonl"
        self._tool("rerank.py", *flags, "--reverse-model", folder / "hf/scorer", *forward, "--output", tuned)
        # The forward scores are in the file by now.
        carried = ("--input", tuned, "--output", untuned)
        return self._tool("rerank.py", *flags, "--reverse-model", folder / "hf/reverse", *carried).strip()

    def evaluate(self) -> str:
        """Run tools/evaluate_rerank.py over all seeds, with both scorers."""
        for name in ("ranked-untuned", "ranked"):
            files = [self._of(seed) / f"{name}.jsonl" for seed in self.seeds]
            flags = ("--held-out-share", self.settings.held_out_share, "--overwrite")
            output = self.folder / f"{name}-{self._seed_names}"
            table = self._tool("evaluate_rerank.py", "--input", *files, "--output", output, *flags)
        print(table, flush=True)
        return f"{output}.md, .json and .png, and the same of ranked-untuned"

    @property
    def _seed_names(self) -> str:
        return "-".join(map(str, self.seeds))

    def _train(self, seed: int, direction: Direction) -> str:
        iters = self.settings.train_iters
        flags = [
            *("--preset", "tiny", "--device", "cpu", "--direction", direction, "--seed", seed),
            *("--run-dir", self._of(seed) / direction, "--data-path", self.data / "reverse_text_document"),
            *(*self._tokenizer_flags(), *self.settings.model_flags()),
            *("--micro-batch-size", self.settings.batch, "--global-batch-size", self.settings.batch),
            *("--train-iters", iters, "--lr", 3e-3, "--min-lr", 1e-4, "--split", "99,1,0"),
            *("--eval-interval", 500, "--save-interval", 500, "--log-interval", 20),
        ]
        progress = TrainingProgress(iters)
        self._runner.command(torchrun_command("pretrain.py", 1, flags), show=_labelled(direction, progress))
        return f"{direction}: training loss {progress.loss:.3f}{progress.validation_loss}"

    def _convert(self, seed: int, name: str) -> None:
        output = self._of(seed) / "hf" / name
        output.parent.mkdir(exist_ok=True)
        self._tool(
            "convert_to_hf.py", "--load", self._of(seed) / name / "checkpoints", "--output", output, "--overwrite"
        )

    def _of(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}"

    def _tool(self, tool: str, *arguments: object) -> str:
        threads = {"OMP_NUM_THREADS": str(min(self._jobs, len(os.sched_getaffinity(0))))}
        command = [sys.executable, REPOSITORY / "tools" / tool, *arguments]
        return self._runner.command(command, environment=threads, show=_progress_of_tool)

    def _tokenizer_flags(self) -> tuple[object, ...]:
        return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer)


def _progress_of_tool(line: str) -> str | None:
    """The lines in which a tool says how long it will take."""
    return line.strip() if line.rstrip().endswith(" left)") else None


def _labelled(direction: Direction, progress: TrainingProgress) -> Callable[[str], str | None]:
    """Progress of one of two runs that go on at the same time."""

    def show(line: str) -> str | None:
        shown = progress(line)
        return f"{direction}: {shown}" if shown else None

    return show
