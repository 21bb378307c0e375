"""Fine-tuning a scorer: what is learnt is what is scored, pair by pair, padded or packed, on one stage or two."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import SMALL, Pretrain

from megatron_ledom.data.dataset import sequence_lengths
from megatron_ledom.data.pairs import pack
from megatron_ledom.inference import ReverseLM
from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.testing import run_distributed, run_tool
from megatron_ledom.train.metrics import TRAIN_LOSS, read_scalars

pytestmark = pytest.mark.distributed

NUM_PAIRS, SEQ_LENGTH, SEPARATOR = 48, 64, "\n"


def word_problems() -> list[dict[str, str]]:
    generator = random.Random(0)
    problems = []
    for _ in range(NUM_PAIRS):
        a, b = generator.randint(1, 999), generator.randint(1, 9)
        more = " and" * generator.randint(0, 8)
        problems.append({"question": f"What is {a}{more} {b}?", "answer": f"{a} + {b} = {a + b}"})
    return problems


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in word_problems()))
    done = run_tool(
        "preprocess_pairs.py",
        *("--input", folder / "pairs.jsonl", "--output-prefix", folder / "p", "--separator", SEPARATOR),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder),
        *("--max-tokens", SEQ_LENGTH),
    )
    assert done.returncode == 0, done.stderr
    return folder / "p_pairs_document"


def test_the_loss_is_the_score_of_the_questions_and_nothing_else(
    pairs: Path, prefixes: dict[str, Path], tmp_path: Path, pretrain: Pretrain
) -> None:
    still = ["--lr", 0, "--min-lr", 0, "--train-iters", 1]
    pretrain(tmp_path / "base", 1, "--data-path", prefixes["reverse"], *still, "--init-method-std", 0.3)
    start = ["--pretrained-checkpoint", tmp_path / "base" / "checkpoints", "--use-checkpoint-args"]
    data = ["--data-path", pairs, "--split", "100,0,0", "--eval-iters", 0, *still, *start]
    num_packed = len(pack(np.array(sequence_lengths(pairs)), SEQ_LENGTH))
    assert NUM_PAIRS / 3 < num_packed < NUM_PAIRS
    pretrain(tmp_path / "padded", 1, *data, "--global-batch-size", NUM_PAIRS)
    stages = ["--pipeline-model-parallel-size", 2, "--pack-pairs"]
    pretrain(tmp_path / "packed", 2, *data, *stages, "--global-batch-size", num_packed)
    for attention in ("megatron", "ledom"):
        flags = ["--pack-pairs", "--attention", attention, "--global-batch-size", num_packed]
        pretrain(tmp_path / attention, 1, *data, *flags)

    exported = run_tool("convert_to_hf.py", "--load", tmp_path / "base" / "checkpoints", "--output", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    lm = ReverseLM.load(tmp_path / "hf", device="cpu")
    scores = lm.logprobs([(p["question"], SEPARATOR + p["answer"]) for p in word_problems()], closed=True)
    expected = -sum(score.logprob for score in scores) / sum(score.num_tokens for score in scores)
    assert expected > 7.5  # far from the even distribution's 6.93, so that a wrong mask or neighbour shows
    later = lm.tokenizer.encode(" = 12", add_special_tokens=False)
    prompt = torch.tensor([[0, *later[::-1]]])
    grown = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    (written,) = lm.write(" = 12", Sampling(max_new_tokens=20, greedy=True))
    new = grown[0, prompt.shape[1] :].tolist()[: written.num_tokens]
    assert written.whole == lm.tokenizer.decode(new[::-1] + later)
    for name in ("padded", "packed", "megatron", "ledom"):
        assert read_scalars(tmp_path / name, TRAIN_LOSS)[1] == pytest.approx(expected, rel=1e-5), name


def test_a_step_of_packed_pairs_is_traced_and_goes_on_only_as_it_began(
    pairs: Path, tmp_path: Path, tokenizer_folder: Path, pretrain: Pretrain
) -> None:
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    flags = ["--data-path", pairs, "--split", "100,0,0", "--pack-pairs", "--train-iters", 4]
    pretrain(tmp_path / "run", 1, *flags, "--exit-interval", 3, "--save-interval", 3)
    traced = run_tool("which_documents.py", "--run-dir", tmp_path / "run", "--step", 3, "--json")
    assert traced.returncode == 0, traced.stderr
    samples = json.loads(traced.stdout)["samples"]
    questions = {problem["question"] for problem in word_problems()}
    texts = [part["text_natural"] for sample in samples for part in sample["documents"]]
    assert len(texts) > len(samples)
    assert all(text.split(SEPARATOR)[0] in questions for text in texts)
    num_packed = len(pack(np.array(sequence_lengths(pairs)), SEQ_LENGTH))
    assert [sample["epoch"] for sample in samples] == [n // num_packed for n in range(16, 24)]  # 8 samples a step
    other = run_distributed(
        "pretrain.py", 1, *SMALL, *flags[:4], "--train-iters", 4, "--run-dir", tmp_path / "run", *tokenizer
    )
    assert other.returncode != 0
    assert "--pack-pairs was True, is False" in other.stderr
