"""Preprocessing, conversion and reranking submitted to a real Slurm; a node that is found bad is left out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import Scripts, wait_for_tasks

from megatron_ledom.testing import english_documents

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("num_shares", [2, 4])
def test_an_array_preprocesses_and_joins(
    scripts: Scripts, corpus: Path, tokenizer_folder: Path, prefixes: dict[str, Path], tmp_path: Path, num_shares: int
) -> None:
    variables = {"INPUT": corpus, "OUTPUT_PREFIX": tmp_path / "data/shared", "TOKENIZER": tokenizer_folder}
    (tmp_path / "data").mkdir()
    array = scripts.submit("preprocess_array.sbatch", options=(f"--array=0-{num_shares - 1}",), **variables)
    wait_for_tasks("tools/preprocess_data.py", str(variables["OUTPUT_PREFIX"]), "--shard-index", "1")
    scripts.slurm.call("scancel", "--signal=USR1", "--batch", f"{array.number}_1")  # one task, as at a time limit
    merge = scripts.submit(
        "preprocess_array.sbatch",
        options=("--array=0", f"--dependency=afterok:{array.number}"),
        MERGE=1,
        OUTPUT_PREFIX=variables["OUTPUT_PREFIX"],
    )
    assert merge.wait() == ["COMPLETED"], merge.end()
    assert array.wait() == ["COMPLETED"] * num_shares
    shown = scripts.slurm.call("scontrol", "show", "job", "--oneliner", f"{array.number}_1")
    assert "Restarts=1" in shown, "the task that was signalled, and no other, went on later"
    assert scripts.slurm.call("scontrol", "show", "job", "--oneliner", array.number).count("Restarts=1") == 1
    for share in range(num_shares):
        log = (tmp_path / f"{array.number}-{share}.log").read_text()
        assert f"share {share} of {num_shares} is done" in log
        assert "job ended: done" in log.rstrip().rsplit("\n", 1)[-1]
    for suffix in (".bin", ".idx"):
        joined, whole = (Path(f"{p}{suffix}") for p in (tmp_path / "data/shared_text_document", prefixes["reverse"]))
        assert joined.read_bytes() == whole.read_bytes(), "as one process writes it"


@pytest.fixture(scope="module")
def exported(slurm: object, cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Hugging Face folder that convert.sbatch made of a checkpoint."""
    folder = tmp_path_factory.mktemp("converted")
    job = Scripts(slurm, folder).submit(  # type: ignore[arg-type]
        "convert.sbatch", "--no-parity", CHECKPOINT=cases / "gqa_padded", OUTPUT=folder / "hf"
    )
    assert job.wait() == ["COMPLETED"], job.end()
    assert "job ended: done" in job.last_line()
    yield folder / "hf"


def test_conversion(exported: Path) -> None:
    assert json.loads((exported / "config.json").read_text())["ledom"]["direction"] == "reverse"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=exported, check=True)


def test_reranking_with_two_and_four_tasks_gives_the_same(scripts: Scripts, exported: Path, tmp_path: Path) -> None:
    texts = english_documents()[:6]
    lines = [
        {
            "question": text[:60],
            "candidates": [
                {"text": text[60 + 20 * k : 80 + 20 * k], "token_logprobs": [-1.0, -0.5 * k]} for k in range(3)
            ],
        }
        for text in texts
    ]
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    ranked = {}
    for num_tasks in (2, 4):
        output = tmp_path / f"ranked-{num_tasks}.jsonl"
        job = scripts.submit(
            "rerank.sbatch",
            *("--lambda", 0.5, "--normalize", "token"),
            options=(f"--ntasks={num_tasks}",),
            REVERSE_MODEL=exported,
            INPUT=candidates,
            OUTPUT=output,
        )
        assert job.wait() == ["COMPLETED"], job.end()
        assert f"job ended: done ({num_tasks} parts)" in job.last_line()
        ranked[num_tasks] = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["question"] for line in ranked[2]] == [line["question"] for line in lines], "in the input's order"
    rewards = {n: [c["reward"] for line in found for c in line["candidates"]] for n, found in ranked.items()}
    assert len(rewards[2]) == 18
    assert rewards[4] == pytest.approx(rewards[2], rel=1e-5), "other batches, other sums"


def test_a_bad_node_is_left_out_of_the_next_start(
    scripts: Scripts, prefixes: dict[str, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    job = scripts.submit(
        "train_2b.sbatch",
        options=("--nodes=1", "--ntasks=1"),
        RUN_DIR=tmp_path / "run",
        DATA_PATH=prefixes["reverse"],
        TOKENIZER=tokenizer_folder,
        PREFLIGHT=1,
        PREFLIGHT_FLAGS="--min-gemm-tflops 1e6 --timeout-s 900",
    )
    node = scripts.slurm.call("sinfo", "--noheader", "--format=%n").strip()
    job.wait_for(f"job ended: bad nodes: {node}; started again without {node}; requeued")
    assert f"--exclude={node}" in job.text()
    assert "at least 1e+06 is asked for" in job.text()
    assert job.slurm.field(job.number, "ExcNodeList") == node
    assert job.slurm.field(job.number, "Restarts") == "1"
    job.slurm.call("scancel", job.number)
