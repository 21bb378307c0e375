"""Sizes, docstrings, test tiers, and what must never stand in a committed file."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from source_tree import PACKAGE, functions, project_files, python_files, syntax_tree

from megatron_ledom.testing import REPOSITORY

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TOOL_LINES, MAX_SHELL_LINES = 500, 80, 120, 120
TEXT_SUFFIXES = {
    ".py",
    ".md",
    ".sh",
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".txt",
    ".cfg",
    ".sbatch",
    ".env",
    ".cu",
    ".h",
    "",
}


def num_lines(path: Path) -> int:
    return len((REPOSITORY / path).read_text(encoding="utf-8").splitlines())


def test_files_and_functions_stay_short() -> None:
    faults = []
    for path in python_files():
        limit = MAX_TOOL_LINES if path.parts[0] == "tools" else MAX_FILE_LINES
        if num_lines(path) >= limit:
            faults.append(f"{path}: {num_lines(path)} lines, the limit is {limit}")
        for node in functions(syntax_tree(path)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, the limit is {MAX_FUNCTION_LINES}"
                )
    shell = [p for p in project_files() if p.suffix in {".sh", ".sbatch"} or p == Path(".ci/run")]
    assert len(shell) >= 3
    faults += [f"{p}: {num_lines(p)} lines" for p in shell if num_lines(p) >= MAX_SHELL_LINES]
    assert not faults, "\n".join(faults)


def test_modules_and_public_functions_have_docstrings() -> None:
    faults = []
    for path in python_files(PACKAGE, "tools", "examples"):
        tree = syntax_tree(path)
        if not ast.get_docstring(tree):
            faults.append(f"{path}: no module docstring")
        public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for node in public:  # ruff's D rules look at methods
            if not node.name.startswith("_") and not ast.get_docstring(node):
                faults.append(f"{path}:{node.lineno}: {node.name} has no docstring")
    assert not faults, "\n".join(faults)


def test_every_tier_holds_tests_and_none_is_skipped() -> None:
    tests = [p for p in python_files("tests") if p.name.startswith("test_")]
    folders = {p.parts[1] for p in project_files() if p.parts[0] == "tests" and len(p.parts) > 2}
    for tier in sorted(folders - {"assets", "golden"}):
        found = [
            f for p in tests if p.parts[1] == tier for f in functions(syntax_tree(p)) if f.name.startswith("test_")
        ]
        assert found, f"tests/{tier} holds no test: a tier that would run nothing must fail"
    for path in tests:
        names = [f.name for f in syntax_tree(path).body if isinstance(f, ast.FunctionDef)]
        assert any(n.startswith("test_") for n in names) or "class Test" in (REPOSITORY / path).read_text(), path
        for node in ast.walk(syntax_tree(path)):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            forbidden = ("pytest.skip", "pytest.mark.skip", "pytest.mark.skipif", "pytest.importorskip")
            assert text not in (*forbidden, "pytest.mark.xfail", "pytest.xfail"), f"{path}:{node.lineno}: {text}"


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports test files by their bare name."""
    names = [p.name for p in python_files("tests") if p.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_ci_runs_make_test_and_nothing_else_decides() -> None:
    lines = (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip() and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    assert code[-1] == "make test"
    assert not any("|| true" in line for line in code)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^test: env lint\b", makefile, re.M)


@pytest.mark.parametrize(
    "script",
    [".ci/run", "scripts/find_python.sh", "scripts/setup_env.sh", "scripts/ensure_slurm.sh", "examples/slurm/task.sh"],
)
def test_scripts_are_executable(script: str) -> None:
    mode = subprocess.run(
        ["git", "ls-files", "--stage", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert (REPOSITORY / script).stat().st_mode & 0o111
    assert mode.startswith("100755"), f"{script} is committed with mode {mode[:6]}"


def test_no_file_names_a_place_on_someones_machine() -> None:
    pattern = re.compile(
        r"(?<![\w.])/(?:" + "|".join(["home", "root", "Users", "work", "mnt", "scratch"]) + r")/[\w.-]+"
    )
    hosts = re.compile(
        "|".join(["py" + r"pi\.org", "python" + r"hosted\.org", "npm" + r"js\.org", r"hugging" + r"face\.co"])
    )
    faults = []
    for path in project_files():
        if path.suffix not in TEXT_SUFFIXES or path.name == "tokenizer.json":
            continue
        for number, line in enumerate((REPOSITORY / path).read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line) or hosts.search(line):
                faults.append(f"{path}:{number}: {line.strip()[:120]}")
    assert not faults, "\n".join(faults)
