"""tools/preflight.py on this machine: one process with a run's flags, ranks on pretended nodes, missing ranks."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from megatron_ledom.testing import REPOSITORY, run_tool, tool_environment


def test_a_run_that_can_start(prefixes: dict[str, Path], tokenizer_folder: Path, tmp_path: Path) -> None:
    run = ["--preset", "tiny", "--device", "cpu", "--run-dir", tmp_path / "run", "--data-path", prefixes["reverse"]]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    done = run_tool("preflight.py", "--device", "cpu", "--timeout-s", 280, "--", *run, *tokenizer)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for words in (
        "ok          data: 1 datasets, 79 documents: whole, of this tokenizer; reverse model",
        "ok          configuration: TP 1 x PP 1 x DP 1; Megatron's validation passes",
        "ok          disk: ",
        "no peer to compare it with",
        "not checked GPUs: no CUDA device in use: GPU health, Transformer Engine, FP8, NCCL",
        "not checked collectives: one process",
        "nothing speaks against starting",
    ):
        assert words in done.stdout, words
    assert not list((tmp_path / "run").glob(".preflight*")), "the probe is gone"
    assert not (tmp_path / "run/checkpoints").exists()


def test_flags_that_the_run_would_refuse(tmp_path: Path) -> None:
    done = run_tool(
        "preflight.py", "--timeout-s", 280, "--device", "cpu", "--", "--preset", "tiny", "--run-dir", tmp_path
    )
    assert done.returncode == 2
    assert "bad         run: --tokenizer-type is missing" in done.stdout
    assert done.stdout.rstrip().endswith("do not start: see above")


class Ranks:
    """Ranks of tools/preflight.py on pretended nodes, two to a node; `start` starts some of four."""

    def __init__(self, *flags: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self._common = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._command = [sys.executable, str(REPOSITORY / "tools/preflight.py"), "--device", "cpu", *map(str, flags)]
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, *ranks: int) -> Ranks:
        for rank in ranks:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "SLURMD_NODENAME": f"node{rank // 2}"}
            self.processes[rank] = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=tool_environment(self._common | own),
            )
        return self

    def result(self) -> tuple[int, str]:
        """Rank 0's status and report; the others are ended."""
        output, _ = self.processes[0].communicate(timeout=400)
        for process in self.processes.values():
            process.kill()
            process.communicate()
        return self.processes[0].returncode, output


def test_nodes_are_compared_and_bad_ones_excluded(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude"
    common = ("--timeout-s", 280, "--exclude-file", exclude)
    status, report = Ranks("--tolerance", 1, "--min-gemm-tflops", 1e-9, *common).start(*range(4)).result()
    assert status == 0, report
    for check in ("GEMM", "memory", "all-reduce in a node", "all-reduce with a neighbour", "all-reduce over all ranks"):
        assert f"ok          {check}: " in report
    assert report.count(" on 2 nodes") == 5
    assert not exclude.exists()

    status, report = Ranks("--min-gemm-tflops", 1e6, *common).start(*range(4)).result()
    assert status == 3, report
    assert report.splitlines()[-1] == "--exclude=node0,node1"
    assert exclude.read_text() == "node0,node1\n"


def test_who_never_came_is_said_when_time_is_up() -> None:
    status, report = Ranks("--timeout-s", 5).start(0).result()
    assert status == 2
    assert "not checked time: not finished within 5 s" in report
    assert "bad         time: ranks [1, 2, 3] never started" in report
