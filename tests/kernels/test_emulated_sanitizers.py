"""The emulated kernels under ThreadSanitizer and AddressSanitizer: each CUDA thread is a thread of its own to them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from emulation import FLAGS, compile_objects, kernel_sources, run_command
from synchronisation import synchronisations

MAIN = Path(__file__).parent / "sanitized_run.cpp"
SHAPES = ((64, 150), (128, 70), (192, 70))
RACE_EXIT = 66
# Without address randomisation: an old ThreadSanitizer does not know where a new kernel puts libraries.
FIXED_ADDRESSES = ("setarch", "-R")


def build(folder: Path, sanitizers: str, macro: str) -> Path:
    flags = ["-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"]
    program = folder / "sanitized_run"
    objects = compile_objects(folder, [MAIN, *kernel_sources()], flags, [f"-D{macro}"])
    run_command(["g++", *FLAGS, *flags, "-pthread", *objects, "-o", str(program)])
    return program


@pytest.fixture(scope="module")
def racing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tsan"), "thread", "LEDOM_EMULATION_TSAN")


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [*FIXED_ADDRESSES, str(program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(("head_dim", "seq"), SHAPES)
def test_no_two_threads_race(racing: Path, head_dim: int, seq: int) -> None:
    done = run(racing, head_dim, seq)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_barrier_is_needed_to_prevent_a_race(racing: Path) -> None:
    lines = {place: what for place, what in synchronisations().items() if what.startswith("__sync")}
    assert len(lines) >= 5
    for (file, line), what in lines.items():
        done = run(racing, 64, 200, file, line)
        report = next((text for text in done.stderr.splitlines() if text.startswith("SUMMARY")), "none")
        print(f"{file}:{line} {what}: exit {done.returncode}, {report}")
        assert done.returncode == RACE_EXIT and "data race" in done.stderr, (file, line, what, done.stdout)


def test_every_address_is_inside_its_buffer(tmp_path: Path) -> None:
    program = build(tmp_path, "address,undefined", "LEDOM_EMULATION_ASAN")
    for head_dim, seq in SHAPES:
        done = run(program, head_dim, seq)
        assert done.returncode == 0, done.stdout + done.stderr
    beyond = run(program, *SHAPES[0], "short")
    assert beyond.returncode != 0 and "heap-buffer-overflow" in beyond.stderr and "carry_out" in beyond.stderr
