"""The runner of the examples ends what it started when it is ended itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_ledom.testing import REPOSITORY, tool_environment

# Two commands at a time, from threads, as the experiment trains its twins.
PROGRAM = """
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runner import Runner, Step

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
runner = Runner(Path(sys.argv[1]), environment={})
sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]

def work():
    with ThreadPoolExecutor(2) as pool:
        return "".join(pool.map(lambda _: runner.command(sleep, show=str.strip), range(2)))

runner.run_plan([Step("sleep", "two commands", work, 1)])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_command_behind(tmp_path: Path, number: signal.Signals) -> None:
    environment = tool_environment()
    environment["PYTHONPATH"] = f"{REPOSITORY / 'examples/quickstart'}:{environment.get('PYTHONPATH', '')}"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        up = 0
        while up < 2:
            up += process.stdout.readline().strip() == "up"
        commands = psutil.Process(process.pid).children(recursive=True)
        assert len(commands) == 2
        targets = [process.pid] if number == signal.SIGTERM else [process.pid, *(c.pid for c in commands)]
        for pid in targets:  # Ctrl-C reaches everything in the terminal
            psutil.Process(pid).send_signal(number)
        process.wait(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in commands):
        assert time.monotonic() < deadline, "a command is still running"
        time.sleep(0.05)
    assert not (tmp_path / "steps/sleep.json").exists()
