"""What tests and examples share: real text, a small real tokenizer, and ways to run the tools.

Shipped in the package, so that a cluster can check an installation with the same
parts. Nothing here is downloaded: text comes from the Python installation itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

END_OF_DOCUMENT = "<|endoftext|>"
REPOSITORY = Path(__file__).resolve().parent.parent


def english_documents() -> list[str]:
    """Return the 79 chapters of the Python language reference as shipped with the interpreter (0.5 MB of prose)."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def code_documents(count: int) -> list[str]:
    """Return `count` source files of the standard library, in path order: real text with every kind of character.

    Raises:
        RuntimeError: the interpreter ships fewer files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the interpreter's own tests of other encodings
            continue
        if text.strip():
            documents.append(text)
        if len(documents) == count:
            return documents
    raise RuntimeError(f"{root} holds {len(documents)} readable source files, {count} were asked for")


def write_jsonl(path: Path, texts: Iterable[str], *, key: str = "text") -> Path:
    """Write one `{key: text}` object a line and return `path`."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({key: text}, ensure_ascii=False) + "\n")
    return path


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, *, single_digits: bool = False) -> Path:
    """Train a byte-level BPE tokenizer and save it as a folder that `transformers.AutoTokenizer` loads.

    Args:
        texts: the training text.
        vocab_size: size with the end-of-document token, whose id is 0.
        folder: made if absent.
        single_digits: every digit is a token of its own.

    Returns:
        `folder`, holding `tokenizer.json` and `tokenizer_config.json`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if single_digits else words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def tool_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a tool under test: one thread, no dynamo, no hub, nothing inherited from torchrun."""
    inherited = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}}
    fixed = {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
    }
    return {**inherited, **fixed, **(extra or {})}


def run_tool(
    tool: str, *arguments: object, timeout_s: float = 300, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `tools/<tool>` as a user does and return its status and output, whatever the status is."""
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=tool_environment(env)
    )


def run_program(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in an interpreter of its own, in `folder`, and return its output.

    Raises:
        RuntimeError: its status is not 0; with the end of what it wrote to standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False, env=tool_environment()
    )
    if done.returncode != 0:
        raise RuntimeError(f"the program ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return done


def watch_file_system(on_change: Callable[[int], None]) -> None:
    """Call `on_change` with their number, from 1, before each of this process's own changes to files and folders.

    It ends with the process: Python has no way to take an audit hook back.
    """
    changes = {"os.rename", "os.remove", "os.truncate", "os.rmdir", "os.mkdir", "os.link"}
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        is_writing = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if event in changes or is_writing:
            count += 1
            on_change(count)

    sys.addaudithook(hook)


def torchrun_command(tool: str, num_processes: int, arguments: Sequence[object]) -> list[str]:
    """Return the command that starts `tools/<tool>` on `num_processes` local ranks; torchrun picks a free port."""
    return [
        sys.executable,
        *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)],
        str(REPOSITORY / "tools" / tool),
        *map(str, arguments),
    ]


def run_distributed(
    tool: str, num_processes: int, *arguments: object, timeout_s: float = 600, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `tools/<tool>` on `num_processes` local ranks and return its status and output, whatever the status is."""
    command = torchrun_command(tool, num_processes, arguments)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=tool_environment(env)
    )
