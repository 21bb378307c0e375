"""The project's files and their syntax trees, as the architecture tests see them."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_ledom.testing import REPOSITORY

PACKAGE = "megatron_ledom"


@functools.cache
def project_files() -> tuple[Path, ...]:
    """Every file that is committed or about to be (not ignored), relative to the checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    paths = tuple(Path(line) for line in sorted(set(listed.splitlines())) if (REPOSITORY / line).is_file())
    assert len(paths) > 20, f"git lists only {len(paths)} files below {REPOSITORY}"
    return paths


def python_files(*folders: str) -> list[Path]:
    """The project's Python files below the given top-level folders, or all of them."""
    found = [p for p in project_files() if p.suffix == ".py" and (not folders or p.parts[0] in folders)]
    assert found, f"no Python file below {folders}"
    return found


@functools.cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """`megatron_ledom/data/manifest.py` -> `megatron_ledom.data.manifest`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, at the top or inside a function: (line, absolute dotted name).

    For `from a.b import c` it gives `a.b.c`, which may name a module or something in one.
    """
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
