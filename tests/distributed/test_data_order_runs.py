"""What live runs read: the same samples at any layout, length and over a resume, traced to their documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import SMALL

from megatron_ledom.errors import UsageError
from megatron_ledom.testing import REPOSITORY, english_documents, run_distributed, run_tool, write_jsonl
from megatron_ledom.train.metrics import TRAIN_LOSS, read_scalars
from megatron_ledom.train.replay import describe_step, find_launch, trace_step

pytestmark = pytest.mark.distributed

RECORDER = str(REPOSITORY / "tests/distributed/record_batches.py")
SMALLER = [*SMALL, "--num-layers", 2]
Batches = dict[tuple[int, int, int], list[int]]  # (step, data-parallel rank, micro-batch) -> tokens


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> list[object]:
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory, tokenizer: list[object]) -> list[object]:
    """A reversed and a forward dataset of short lines, so small that the run reads each more than once."""
    folder = tmp_path_factory.mktemp("blend")
    lines = [line for text in english_documents() for line in text.splitlines() if 30 < len(line) < 70]
    words: list[object] = []
    for name, direction, weight, texts in (
        ("large", "reverse", 3, ["", *lines[:80], "", "", *lines[80:160]]),  # empty records become no documents
        ("small", "forward", 1, lines[160:190]),
    ):
        path = write_jsonl(folder / f"{name}.jsonl", texts)
        data = ["--input", path, "--output-prefix", folder / name, "--direction", direction, "--append-eod"]
        done = run_tool("preprocess_data.py", *data, *tokenizer)
        assert done.returncode == 0, done.stderr
        words += [weight, folder / f"{name}_text_document"]
    return words


def record(run: Path, num_ranks: int, *arguments: object) -> tuple[Batches, str]:
    """Train, and return what every data-parallel rank read, and the log."""
    records = run / f"read-{len(list(run.glob('read-*'))) if run.exists() else 0}"
    records.mkdir(parents=True)
    flags = [*SMALLER, "--run-dir", run, *arguments]
    done = run_distributed(RECORDER, num_ranks, *flags, env={"RECORD_TO": str(records)})
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    batches: Batches = {}
    for path in records.iterdir():
        rank = int(path.stem.removeprefix("rank-"))
        counts: dict[int, int] = {}
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            (tokens,) = entry["tokens"]
            place = (entry["step"], rank, counts.get(entry["step"], 0))
            counts[entry["step"]] = place[2] + 1
            batches[place] = tokens
    return batches, done.stderr


def global_batches(batches: Batches) -> dict[int, list[list[int]]]:
    """Step -> its samples in the order in which the run reads: micro-batch by micro-batch, rank by rank."""
    found: dict[int, list[list[int]]] = {}
    for (step, _, _), tokens in sorted(batches.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])):
        found.setdefault(step, []).append(tokens)
    return found


def trace(run: Path, step: int) -> list[dict[str, Any]]:
    return describe_step(*trace_step(find_launch(run, step), step, run / "tokenizer"), chars=0)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, blend: list[object], tokenizer: list[object]
) -> tuple[Path, Batches, Batches, str]:
    """One run of 8 steps at DP 2; another that is 4 steps long at one rank, and then made 8 steps long at PP 2."""
    folder = tmp_path_factory.mktemp("order")
    data = ["--data-path", *blend, *tokenizer]
    whole, _ = record(folder / "whole", 2, *data, "--train-iters", 8)
    first, _ = record(folder / "parts", 1, *data, "--train-iters", 4)
    longer = ["--train-iters", 8, "--override-opt-param-scheduler", "--pipeline-model-parallel-size", 2]
    second, log = record(folder / "parts", 2, *data, *longer)
    assert {step for step, _, _ in first} == {1, 2, 3, 4} and {step for step, _, _ in second} == {5, 6, 7, 8}
    return folder, whole, first | second, log


def test_samples_do_not_depend_on_layout_length_or_resume(runs: tuple[Path, Batches, Batches, str]) -> None:
    _, whole, parts, _ = runs
    expected = global_batches(whole)
    assert sorted(expected) == list(range(1, 9)) and {len(samples) for samples in expected.values()} == {8}
    assert global_batches(parts) == expected
    assert {rank for _, rank, _ in whole} == {0, 1} and {rank for _, rank, _ in parts} == {0}


def test_the_report_stands_in_the_log_before_training(runs: tuple[Path, Batches, Batches, str]) -> None:
    _, _, _, log = runs
    (line,) = [line for line in log.splitlines() if line.startswith("data: ")]
    assert line == "data: 4.096K tokens (8 steps of 8 samples, 64 samples of 64)"
    small = next(line for line in log.splitlines() if "small_text_document  " in line).split()
    assert small[1:3] == ["25.00", "%"] and small[4:6] == ["1.024K", "16"] and 1.0 < float(small[6]) < 3.0


@pytest.mark.parametrize("name", ["whole", "parts"])
@pytest.mark.parametrize("step", [1, 4, 5, 8])
def test_every_sample_of_a_step_is_traced(runs: tuple[Path, Batches, Batches, str], name: str, step: int) -> None:
    folder, whole, parts, _ = runs
    samples = trace(folder / name, step)
    seen = {(step, s["data_parallel_rank"], s["micro_batch"]): s["ids"][:-1] for s in samples}
    batches = whole if name == "whole" else parts
    assert seen == {place: tokens for place, tokens in batches.items() if place[0] == step}


def test_documents_are_named_by_file_and_shown_as_they_were_written(runs: tuple[Path, Batches, Batches, str]) -> None:
    folder, _, _, _ = runs
    samples = trace(folder / "parts", 6)
    datasets = {Path(s["dataset"]).name: s["is_read_backwards"] for s in samples}
    assert datasets == {"large_text_document": False, "small_text_document": True}
    num_whole = 0
    for sample in samples:
        path = Path(sample["dataset"].replace("_text_document", ".jsonl"))
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for part in sample["documents"]:
            assert Path(part["source"]) == path
            text = [text for text in texts if text][part["document"]]
            assert part["row"] is None or texts[part["row"] - 1] == text
            is_whole = part["natural_range"] == [0, part["tokens"] - 1]
            num_whole += is_whole
            assert part["text_natural"] == text if is_whole else part["text_natural"].strip("\ufffd") in text
    assert num_whole > 8, "documents are short: most are in a sample as a whole"


def test_the_tool_goes_by_a_checkpoint_alone_and_says_where_a_run_ends(
    runs: tuple[Path, Batches, Batches, str],
) -> None:
    folder, whole, _, _ = runs
    done = run_tool("which_documents.py", "--load", folder / "whole" / "checkpoints", "--step", 2, "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert [s["ids"][:-1] for s in json.loads(done.stdout)["samples"]] == global_batches(whole)[2]
    done = run_tool("which_documents.py", "--run-dir", folder / "whole", "--step", 8, "--chars", 20)
    assert done.returncode == 0 and "INFO" not in done.stderr, done.stderr[-4000:]
    assert done.stdout.startswith(
        "step 8: 8 samples, numbers 56 to 63 of the run\n\nsample 56 (micro-batch 0, rank 0): "
    )
    assert ".jsonl, row " in done.stdout and "as the model reads" in done.stdout
    with pytest.raises(UsageError, match="--step 9 lies outside the run: it reads 64 samples, 8 a step"):
        trace(folder / "whole", 9)


def test_a_resume_in_another_order_is_refused_with_both_values(
    runs: tuple[Path, Batches, Batches, str], blend: list[object], tokenizer: list[object]
) -> None:
    folder, _, _, _ = runs
    length = ["--train-iters", 8, "--override-opt-param-scheduler"]
    changed = ["--data-path", 1, blend[1], 1, blend[3], "--seed", 7, "--data-order", "megatron"]
    done = run_tool("pretrain.py", *SMALLER, *tokenizer, "--run-dir", folder / "parts", *length, *changed)
    assert done.returncode == 2, done.stderr[-3000:]
    for words in ("order was epochs, is megatron", "--seed was 1234, is 7", "data was 0.75 ", "is 0.5 "):
        assert words in done.stderr
    assert "--force-data-order-change to read on" in done.stderr


def test_a_forward_file_read_backwards_trains_as_the_reversed_file_does(
    prefixes: dict[str, Path], tokenizer: list[object], tmp_path: Path
) -> None:
    found = {}
    for name, prefix in prefixes.items():
        run = tmp_path / name
        batches, log = record(run, 1, "--data-path", prefix, *tokenizer, "--train-iters", 10)
        assert ("forward documents, read backwards" in log) == (name == "forward")
        found[name] = batches, read_scalars(run, TRAIN_LOSS)
    assert found["forward"][0] == found["reverse"][0]
    losses = found["forward"][1], found["reverse"][1]
    assert list(losses[0]) == list(range(1, 11)) and losses[0] == losses[1], "bit for bit"
    assert losses[0][10] < losses[0][1]
