"""What the scripts of examples/slurm would run, without Slurm: their commands, their refusals, shellcheck."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ledom.checkpoint.commit import Keep
from megatron_ledom.log import get_logger
from megatron_ledom.testing import REPOSITORY, tool_environment
from megatron_ledom.train.saves import Saves

FOLDER = REPOSITORY / "examples/slurm"
SCRIPTS = {
    "train_2b": {"RUN_DIR": "RUN", "DATA_PATH": "1 a 2 b", "TOKENIZER": "tokenizer"},
    "train_7b": {"RUN_DIR": "RUN", "DATA_PATH": "one", "TOKENIZER": "tokenizer"},
    "preprocess_array": {"INPUT": "corpus/ more.jsonl", "OUTPUT_PREFIX": "data/x", "TOKENIZER": "tokenizer"},
    "convert": {"CHECKPOINT": "RUN/checkpoints", "OUTPUT": "hf"},
    "rerank": {"REVERSE_MODEL": "hf", "FORWARD_MODEL": "fw", "INPUT": "in.jsonl", "OUTPUT": "a folder/out.jsonl"},
}
FLAGS = {"train_7b": ["--train-iters", "100"], "rerank": ["--separator", "\n"], "convert": ["--dtype", "bfloat16"]}


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in tool_environment().items() if not k.startswith("SLURM") and k != "VENV"}
    command = ["bash", str(FOLDER / f"{script}.sbatch"), *FLAGS.get(script, [])]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**kept, **variables}, timeout=60)


def printed(script: str, **variables: str) -> list[list[str]]:
    """The commands of a dry run, each a list of words."""
    done = run(script, DRY_RUN="1", **SCRIPTS[script], **variables)
    assert done.returncode == 0, done.stderr
    # A newline is printed as $'\n', which shlex does not know.
    return [shlex.split(line.replace("$'\\n'", "NEWLINE")) for line in done.stdout.splitlines()]


def test_every_script_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.sbatch")} == set(SCRIPTS)


def test_shellcheck_finds_nothing() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = [
        p
        for p in listed.splitlines()
        if p.endswith((".sh", ".sbatch")) or p in {".ci/run", "examples/slurm/cluster.env"}
    ]
    assert len(files) >= 12
    command = [str(Path(sys.executable).parent / "shellcheck"), "--external-sources", *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


PARSE = """
import contextlib, importlib.util, io, json, os, sys
from pathlib import Path
os.environ |= {"WORLD_SIZE": "64", "RANK": "0"}
from megatron_ledom.engine import cpu
from megatron_ledom.engine.arguments import parse_arguments
from megatron_ledom.engine.validation import validate_arguments
cpu.install()  # answers for the GPUs that Megatron's validation asks about
answers = []
for tool, argv in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()):
        if tool == "pretrain.py":
            args = validate_arguments(parse_arguments(argv, "cuda"))
            sizes = [args.world_size, args.data_parallel_size]
            answers.append([args.preset, *sizes, args.bf16, args.sequence_parallel, args.data_path])
        else:
            spec = importlib.util.spec_from_file_location("tool", Path("tools") / tool)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            args = module.build_parser().parse_args(argv)
            answers.append([tool, sorted(k for k, v in vars(args).items() if v not in (None, False))])
            if tool == "preflight.py":
                parse_arguments(args.training, "cuda")
print(json.dumps(answers))
"""


def test_printed_commands_parse_and_megatron_accepts_them_at_64_gpus() -> None:
    calls = []
    for script in SCRIPTS:
        for words in [*printed(script), *(printed(script, MERGE="1") if script == "preprocess_array" else [])]:
            index = next(i for i, word in enumerate(words) if word.startswith("tools/"))
            assert words[0] == "srun"
            assert words[index - 2] == "examples/slurm/task.sh"
            calls.append([Path(words[index]).name, words[index + 1 :]])
    tools = [tool for tool, _ in calls]
    assert tools == [
        *("preflight.py", "pretrain.py", "preflight.py", "pretrain.py"),
        *("preprocess_data.py", "merge_data.py", "convert_to_hf.py", "rerank.py"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=tool_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers[1] == ["2b", 64, 64, True, False, ["1", "a", "2", "b"]]
    assert answers[3] == ["7b", 64, 32, True, True, ["one"]], "TP 2 with sequence parallelism"


def test_containers() -> None:
    (apptainer,) = printed("convert", RUNTIME="apptainer", IMAGE="ledom.sif", MOUNTS="/fs,/data")
    assert apptainer[3:9] == ["apptainer", "exec", "--nv", "--bind", "/fs,/data", "--pwd"]
    assert apptainer[10:13] == ["ledom.sif", "python", "tools/convert_to_hf.py"]
    (pyxis,) = printed("convert", RUNTIME="pyxis", IMAGE="ledom.sqsh", MOUNTS="/fs,/data")
    assert pyxis[2:4] == ["--container-image=ledom.sqsh", "--container-mounts=/fs:/fs,/data:/data"]
    assert pyxis[5:8] == ["examples/slurm/task.sh", "python", "tools/convert_to_hf.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_named(script: str) -> None:
    required = [name for name in SCRIPTS[script] if name != "FORWARD_MODEL"]
    for name in required:
        given = {k: v for k, v in SCRIPTS[script].items() if k != name}
        for dry in ("0", "1"):
            done = run(script, DRY_RUN=dry, **given)
            assert done.returncode == 2
            assert f"job ended: {name} is not set" in done.stdout.splitlines()[-1]
    unknown = run(script, DRY_RUN="1", RUNTIME="docker", **SCRIPTS[script])
    assert unknown.returncode == 2
    assert "RUNTIME=docker is none of venv, apptainer, pyxis" in unknown.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_head_says_what_a_person_needs(script: str) -> None:
    text = (FOLDER / f"{script}.sbatch").read_text(encoding="utf-8")
    head, code = text.split("\nset -euo pipefail\n")
    for word in (
        "# Required\n",
        "# Optional\n",
        "sbatch",
        "DRY_RUN=1",
        "#SBATCH --signal=B:USR1@",
        "#SBATCH --requeue",
    ):
        assert word in head, f"{script}: {word!r}"
    named = {
        line[4:].split()[0].rstrip(",") for line in head.splitlines() if line.startswith("#   ") and line[4:5].isupper()
    }
    assert set(SCRIPTS[script]) <= named | {"OUTPUT"}, named
    assert "$LEDOM_HOME/examples/slurm/common.sh" in code


def test_a_task_learns_its_place_from_slurm(tmp_path: Path) -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    code = f"import os, sys; print(*(os.environ[k] for k in {names}), *sys.argv[1:])"
    command = [FOLDER / "task.sh", sys.executable, "-c", code, "part.{task}.jsonl", "two words"]
    environment = {**os.environ, **slurm}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split("\n")[0] == "5 1 8 4 part.5.jsonl two words"
    (tmp_path / "out.5").touch()
    command_done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment | {"DONE_FILE": f"{tmp_path}/out.{{task}}"}
    )
    assert command_done.stdout == ""


def step_that(does: str, tmp_path: Path) -> dict[str, str]:
    """Variables of a job whose tasks are the bash script `does`; its log is log.txt."""
    commands = {"srun": does, "scontrol": f"echo JobId=7 StdOut={tmp_path}/log.txt"}
    for name, text in commands.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "REQUEUE": "0"}
    return variables | {"REVERSE_MODEL": "hf", "INPUT": f"{tmp_path}/in.jsonl", "OUTPUT": f"{tmp_path}/out.jsonl"}


def test_the_last_question_counts_without_a_newline_behind_it(tmp_path: Path) -> None:
    copy = f'for part in "{tmp_path}"/out.jsonl.parts-of-*/in.*; do cp "$part" "${{part/in./out.}}"; done'
    variables = step_that(copy, tmp_path)
    for count in (2, 3, 4):
        questions = [f"question {n}" for n in range(count)]
        (tmp_path / "in.jsonl").write_text("\n".join(questions), encoding="utf-8")
        done = run("rerank", **variables, SLURM_NTASKS="2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "out.jsonl").read_text().splitlines() == questions
        (tmp_path / "out.jsonl").unlink()


def test_a_failed_save_is_not_why_a_later_crash_ended_the_run(tmp_path: Path) -> None:
    saves, log, heard = Saves(tmp_path, Keep(), 0, "token"), get_logger("megatron_ledom.train.saves"), io.StringIO()
    handler = logging.StreamHandler(heard)
    log.addHandler(handler)
    try:
        saves.saved(4, "No space left on device")  # as Megatron's save calls it
    finally:
        log.removeHandler(handler)
    said = heard.getvalue().strip()
    assert "no checkpoint of step 4: No space left on device" in said
    (tmp_path / "said").write_text(f"{said}\nValueError: a rank died\n", encoding="utf-8")
    variables = step_that(f'cat "{tmp_path}/said" >>"{tmp_path}/log.txt"; exit 1', tmp_path)
    (tmp_path / "in.jsonl").write_text("question\n", encoding="utf-8")
    done = run("rerank", **variables, SLURM_NTASKS="1")
    last = done.stdout.splitlines()[-1]
    assert "job ended: failure 1 of 3 without progress, status 1, ValueError: a rank died; not started again" in last
    assert "refused" not in last
