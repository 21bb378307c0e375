"""tools/generate.py on a terminal: what a person sees while the text grows leftwards, and what stays on the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
import pytest
from random_models import save_random_model

from megatron_ledom.inference import ReverseLM
from megatron_ledom.testing import REPOSITORY, tool_environment

LATER = " is evaluated before the statement, and 東京 is wide."
COLUMNS, LINES = 40, 12
REDRAW = b"\r\x1b[2K"
"""How a drawing that replaces another begins."""


def run_on_terminal(*arguments: object) -> tuple[list[bytes], int]:
    """Run the tool with a pseudo-terminal for standard output; return what it wrote, piece by piece, and its status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = tool_environment({"TERM": "xterm-256color"})
    for name in ("COLUMNS", "LINES"):  # another terminal's; pytest-xdist sets them for its workers
        environment.pop(name, None)
    child = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tools" / "generate.py"), *map(str, arguments)],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    return pieces, child.wait()


def test_the_text_grows_at_its_beginning_and_the_whole_stays(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "m", tokenizer_folder, "reverse")
    flags = ["--model", folder, "--text", LATER, "--greedy", "--max-new-tokens", 30, "--whole", "--device", "cpu"]
    pieces, status = run_on_terminal(*flags)
    assert status == 0
    (written,) = ReverseLM.load(folder, device="cpu").write_before(LATER, max_new_tokens=30, greedy=True)
    terminal, expected = pyte.Screen(COLUMNS, LINES), pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(terminal)
    states = set()
    for number, drawing in enumerate(b"".join(pieces).split(REDRAW)):  # however the reads cut what was written
        stream.feed(REDRAW + drawing if number else drawing)
        states.add("".join("".join(line.split()) for line in terminal.display))
    drawn = sorted((state for state in states if "東" in state), key=len)
    assert len(drawn) >= 2
    assert all(drawn[-1].endswith(state) for state in drawn)
    pyte.Stream(expected).feed((written + LATER).replace("\n", "\r\n") + "\r\n")
    assert terminal.display == expected.display  # nothing of the drawing is left


@pytest.mark.parametrize("flags", [["--num-samples", 3], ["--jsonl"]])
def test_several_samples_and_json_lines(tokenizer_folder: Path, tmp_path: Path, flags: list[object]) -> None:
    folder = save_random_model(tmp_path / "m", tokenizer_folder, "reverse")
    pieces, status = run_on_terminal("--model", folder, "--text", LATER, "--max-new-tokens", 8, *flags)
    assert status == 0
    content = b"".join(pieces)
    assert (b"sample 2 of 3" in content) is ("--num-samples" in flags)
    assert (b"\x1b[" in content) is ("--jsonl" not in flags)
