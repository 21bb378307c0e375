"""A tokenizer in a process of its own: the same answers, asked ahead or not, whatever their size, and its errors.

Only a process of one thread forks one, so every check runs in a fresh process: this file, run as a program.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ledom.data import tokenizer_process
from megatron_ledom.data.tokenizer_process import load_aside
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.errors import InputError
from megatron_ledom.testing import REPOSITORY, english_documents, tool_environment

KIND, FOLDER = "HuggingFaceTokenizer", str(REPOSITORY / "tests" / "assets" / "tokenizer")


def same_answers() -> None:
    right, texts = load_tokenizer(KIND, FOLDER), english_documents()[:3]
    with load_aside(KIND, FOLDER) as aside:
        assert type(aside) is not type(right), "it was loaded here"
        assert (aside.vocab_size, aside.eod_id, aside.library) == (right.vocab_size, right.eod_id, right.library)
        assert aside.fingerprint == right.fingerprint
        assert aside.special_texts() == right.special_texts()
        assert_same(aside.encode_batch(texts), right.encode_batch(texts))
        assert_same(aside.encode_with_starts(texts[0]), right.encode_with_starts(texts[0]))
        assert aside.decode(right.encode(texts[0])) == texts[0]
        assert aside.content() == Path(FOLDER, "tokenizer.json").read_text(encoding="utf-8")
        samples, ids = aside.answer_probes(2, texts)
        assert [token for token, _, _ in samples] == right.special_texts()[:2]
        assert ids == right.encode_short(texts) == [found.tolist() for found in right.encode_batch(texts)]


def not_waited_for() -> None:
    with load_aside(KIND, FOLDER) as aside:
        assert aside.vocab_size > 0  # it has loaded
        slow = aside.ask_ahead("encode_batch", ["a long text " * 400_000])
        assert not slow.is_there(), "it has answered at once"
        answer = slow()
        assert slow.is_there() and len(answer[0]) > 400_000
        quick = aside.ask_ahead("encode_short", ["a"])
        while not quick.is_there():
            time.sleep(0.001)
        assert quick() == load_tokenizer(KIND, FOLDER).encode_short(["a"])
        assert load_tokenizer(KIND, FOLDER).ask_ahead("encode", "a").is_there()
        process = multiprocessing.active_children()[0]
        never = aside.ask_ahead("encode_batch", ["a long text " * 400_000])
        process.kill()
        process.join()
        while not never.is_there():
            time.sleep(0.001)
        assert "was killed; out of memory" in error_of(never)


def without_numpy() -> None:
    code = "import sys; from megatron_ledom.data.tokenizer_process import load_aside; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", "the process begins when numpy is imported, not before"


def more_than_the_pipe_holds() -> None:
    texts = ["東京 🙂 " * 40_000 + str(n) for n in range(4)]
    with load_aside(KIND, FOLDER) as aside:
        taken_last = aside.ask_ahead("answer_probes", 9, texts)
        first, second = aside.ask_ahead("encode_batch", texts), aside.ask_ahead("encode_batch", texts[:1])
        assert aside.fingerprint.startswith("sha256:")
        assert np.array_equal(second()[0], first()[0])
        assert np.array_equal(taken_last()[1][0], first()[0])


def not_loaded() -> None:
    asked: list[Callable[[Any], Any]] = [
        lambda aside: aside.vocab_size,
        lambda aside: aside.fingerprint,
        lambda aside: aside.ask_ahead("special_texts")(),
        lambda aside: (aside.ask_ahead("special_texts"), aside.ask_ahead("special_texts")),
    ]
    for ask in asked:
        with tempfile.TemporaryDirectory() as empty, load_aside(KIND, empty) as aside:
            assert "no tokenizer.json" in error_of(lambda ask=ask, aside=aside: ask(aside))


def killed() -> None:
    def load(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    tokenizer_process.load_tokenizer = load  # type: ignore[assignment]
    with load_aside(KIND, FOLDER) as aside:
        said = error_of(lambda: aside.encode("a"))
    assert re.search(r"the process that loads HuggingFaceTokenizer .* was killed; out of memory", said)


def assert_same(found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> None:
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in right]
    assert all(map(len, right)), "a comparison of nothing"


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except InputError as error:
        return str(error)
    raise AssertionError("nothing was raised")


CHECKS = {
    f.__name__: f for f in (same_answers, not_waited_for, without_numpy, more_than_the_pipe_holds, not_loaded, killed)
}


@pytest.mark.parametrize("name", CHECKS)
def test_in_a_process_of_one_thread(name: str) -> None:
    env = tool_environment({"OPENBLAS_NUM_THREADS": "1"})
    command = [sys.executable, str(Path(__file__)), name]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"{name} passed\n"), done.stdout + done.stderr


if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    print(sys.argv[1], "passed")
