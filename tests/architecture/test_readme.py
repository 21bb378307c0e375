"""README and docs cannot go stale: tools, flags, make targets, paths and links exist; the file map is the tree."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGE, project_files, python_files

from megatron_ledom.testing import REPOSITORY, run_tool, tool_environment

DOCUMENTS = [path for path in project_files() if path.suffix == ".md"]
TOOLS = sorted(path.name for path in python_files("tools"))


def code_blocks(path: Path, *languages: str) -> Iterator[str]:
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S):
        if language in languages:
            yield block


def commands(path: Path) -> Iterator[list[str]]:
    """The shell commands of a document, one list of words each; continued lines are joined."""
    for block in code_blocks(path, "bash", "sh", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@functools.cache
def flags_of(tool: str) -> frozenset[str]:
    """The flags in a tool's help; for the trainer, Megatron's as well."""
    flag = "--help-megatron" if tool == "pretrain.py" else "--help"
    result = run_tool(tool, flag)
    assert result.returncode == 0, f"{tool} {flag}: {result.stderr[-2000:]}"
    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", result.stdout))


def tool_calls() -> Iterator[tuple[Path, str, list[str]]]:
    """Every call of a tool in any document: (document, tool, flags); what stands after `--` is the trainer's."""
    for document in DOCUMENTS:
        for words in commands(document):
            for index, word in enumerate(words):
                if re.fullmatch(r"(?:\S*/)?tools/\w+\.py", word):
                    rest = words[index + 1 :]
                    end = rest.index("--") if "--" in rest else len(rest)
                    for tool, own in ((Path(word).name, rest[:end]), ("pretrain.py", rest[end:])):
                        if own or tool != "pretrain.py":
                            yield document, tool, [w.split("=", 1)[0] for w in own if re.match(r"--[a-z]", w)]


def test_every_tool_and_flag_in_the_documents_exists() -> None:
    calls = list(tool_calls())
    assert len(calls) >= len(TOOLS)
    faults = []
    for document, tool, flags in calls:
        if tool not in TOOLS:
            faults.append(f"{document}: there is no tools/{tool}")
            continue
        faults += [f"{document}: tools/{tool} has no {flag}" for flag in flags if flag not in flags_of(tool)]
    assert not faults, "\n".join(faults)


def test_readme_shows_every_tool() -> None:
    shown = {tool for document, tool, _ in tool_calls() if document == Path("README.md")}
    assert shown == set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_succeeds(tool: str) -> None:
    result = run_tool(tool, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert result.stderr == ""


def test_make_targets_in_the_documents_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    named = {words[1] for document in DOCUMENTS for words in commands(document) if words[0] == "make"}
    assert {"quickstart", "test"} <= named
    assert named <= targets


def test_quickstart_flags_in_the_documents_exist() -> None:
    script = REPOSITORY / "examples/quickstart/quickstart.py"
    result = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True, env=tool_environment()
    )
    calls = [w for d in DOCUMENTS for w in commands(d) if any("quickstart" in word for word in w)]
    assert calls
    for words in calls:
        arguments = " ".join(word.removeprefix("ARGS=") for word in words)
        for flag in re.findall(r"--[a-z][\w-]*", arguments):
            assert flag in result.stdout, f"quickstart has no {flag}: {words}"


def file_map() -> list[str]:
    """The paths of README's file map: the first column of the block after the heading "File map"."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^## File map\n.*?```text\n(.*?)```", text, re.M | re.S)
    assert match, "README.md has no file map"
    paths = [re.split(r"  +", line)[0] for line in match[1].splitlines() if line.strip() and not line.startswith(" ")]
    return [path for entry in paths for path in entry.split(", ")]


def test_file_map_is_the_tree() -> None:
    listed = file_map()
    assert len(listed) == len(set(listed))
    files = [str(path) for path in project_files()]
    missing = [p for p in listed if not any(f == p or (p.endswith("/") and f.startswith(p)) for f in files)]
    assert not missing, f"in the file map and not in the tree: {missing}"
    uncovered = [f for f in files if not any(f == p or (p.endswith("/") and f.startswith(p)) for p in listed)]
    assert not uncovered, f"in the tree and not in the file map: {uncovered}"
    rooms = {f"{PACKAGE}/{p.parts[1]}/" for p in python_files(PACKAGE) if len(p.parts) > 2}
    own_entry = rooms | {str(p) for p in python_files("tools")} | {f for f in files if f.startswith("docs/")}
    own_entry |= {f"tests/{p.parts[1]}/" for p in project_files() if p.parts[0] == "tests" and len(p.parts) > 2}
    assert own_entry <= set(listed), f"need an entry of their own: {sorted(own_entry - set(listed))}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", prose):
        if not target.startswith(("https://", "http://", "mailto:")):
            assert (REPOSITORY / document.parent / target).exists(), f"{document}: {target}"
    for path in re.findall(r"`((?:docs|tools|tests|examples|scripts|megatron_ledom)/[\w./-]+)`", prose):
        assert (REPOSITORY / path).exists(), f"{document}: {path}"


def test_every_document_is_reachable_from_the_readme() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        if document.parts[0] == "docs" or document.name in {"CONTRIBUTING.md", "CHANGELOG.md"}:
            assert f"({document})" in text, f"README.md does not link {document}"


def test_dependencies_are_explained() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["dependencies"] + [r for rs in project["optional-dependencies"].values() for r in rs]
    names = {re.match(r"[\w.-]+(?:\[\w+\])?", requirement)[0] for requirement in declared}  # type: ignore[index]
    text = (REPOSITORY / "docs/dependencies.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == names
