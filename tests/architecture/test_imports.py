"""Arrows of import run one way, Megatron is imported in few rooms, and importing does no work."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import PACKAGE, imported_modules, module_name, python_files, syntax_tree

from megatron_ledom.testing import REPOSITORY, tool_environment


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process at the root of the repository."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=tool_environment(), check=False)


# A room may import from its own and from lower levels.
LEVELS = (
    ("errors", "log", "direction", "files"),
    ("ops", "data", "engine"),
    ("model", "checkpoint"),
    ("train", "convert", "inference"),
    ("rerank", "evaluation", "cluster", "report"),
    ("tools",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Between rooms of one level there is no arrow, except:
SAME_LEVEL = {
    ("direction", "errors"),
    ("files", "errors"),
    ("files", "log"),
    ("inference", "convert"),  # a checkpoint is loaded as the model that it would be exported as
    ("checkpoint", "model"),  # a checkpoint can be turned back into the network that wrote it
}
# For tests and examples only; it uses nothing of the rest, so that it can judge it.
FREE_STANDING = "testing"
# Two modules of data: their classes derive from Megatron's dataset.
MEGATRON_ROOMS = {"engine", "model", "checkpoint", "train", "data.megatron_dataset", "data.megatron_pairs"}
HEAVY = ("torch", "transformers", "megatron", "tensorboard", "matplotlib", "pandas", "scipy", "sklearn")


def room_of(module: str) -> str | None:
    """`megatron_ledom.data.manifest` -> `data`; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def edge_fault(source: str | None, target: str) -> str | None:
    """Say what is wrong with a room importing another, if anything."""
    if target == source:
        return None
    if target == FREE_STANDING:
        return "testing is for tests and examples"
    if source == FREE_STANDING or source is None:
        return f"{source or 'the package'} stands free"
    if target not in LEVEL or source not in LEVEL:
        return f"{target if target not in LEVEL else source} is no room of the house: add it to LEVELS"
    if LEVEL[target] < LEVEL[source] or (source, target) in SAME_LEVEL:
        return None
    return f"{source} (level {LEVEL[source]}) must not import {target} (level {LEVEL[target]})"


def test_arrows_of_import_run_one_way() -> None:
    faults = []
    edges = 0
    for path in python_files(PACKAGE, "tools"):
        source = "tools" if path.parts[0] == "tools" else room_of(module_name(path))
        for line, name in imported_modules(path):
            if not name.startswith(f"{PACKAGE}.") or name == f"{PACKAGE}.__version__":
                continue
            edges += 1
            fault = edge_fault(source, name.split(".")[1])
            if fault:
                faults.append(f"{path}:{line}: {fault}")
    assert edges > 30
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("source", "target", "is_allowed"),
    [
        ("train", "data", True),
        ("direction", "errors", True),
        ("checkpoint", "model", True),
        ("model", "checkpoint", False),
        ("tools", "rerank", True),
        ("data", "train", False),
        ("errors", "direction", False),
        ("convert", "inference", False),
        ("data", "engine", False),
        ("train", "testing", False),
        ("testing", "direction", False),
        (None, "direction", False),
        ("train", "kitchen", False),
    ],
)
def test_the_rule_itself(source: str | None, target: str, is_allowed: bool) -> None:
    assert (edge_fault(source, target) is None) is is_allowed


def test_tools_do_not_import_each_other() -> None:
    names = {path.stem for path in python_files("tools")}
    for path in python_files("tools"):
        for line, name in imported_modules(path):
            assert name.split(".")[0] not in {*names, "tools"}, f"{path}:{line} imports the tool {name}"


def test_megatron_is_imported_in_its_rooms_only() -> None:
    faults = []
    found = 0
    for path in python_files(PACKAGE, "tools", "examples"):
        parts = module_name(path).split(".")[1:]
        is_room = path.parts[0] == PACKAGE and bool({parts[0] if parts else "", ".".join(parts[:2])} & MEGATRON_ROOMS)
        for line, name in imported_modules(path):
            if name.split(".")[0] == "megatron":
                found += 1
                if not is_room:
                    faults.append(f"{path}:{line}: import of {name} outside {sorted(MEGATRON_ROOMS)}")
    assert found > 5
    assert not faults, "\n".join(faults)


def test_imports_are_absolute() -> None:
    for path in python_files():
        for node in ast.walk(syntax_tree(path)):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}: relative import"


def test_tools_parse_arguments_without_heavy_imports() -> None:
    """One process imports each tool and builds its parser; the time of `--help` is measured in benchmarks/."""
    code = f"""
import importlib.util, json, sys
from pathlib import Path
heavy, loaded = {HEAVY!r}, {{}}
for path in sorted(Path("tools").glob("*.py")):
    spec = importlib.util.spec_from_file_location("tool_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "build_parser"):
        module.build_parser().format_help()
    loaded[path.name] = sorted(name for name in heavy if name in sys.modules)
print(json.dumps(loaded))
"""
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert set(loaded) == {path.name for path in python_files("tools")}
    assert not {tool: names for tool, names in loaded.items() if names}


def test_importing_the_package_patches_nothing() -> None:
    """Functions and classes of torch and Megatron are the same objects before and after every module is imported."""
    modules = [module_name(path) for path in python_files(PACKAGE)]
    code = f"""
import importlib, sys, types
import torch, torch._dynamo, torch.distributed, numpy
import megatron.core, megatron.core.optimizer, megatron.training, megatron.core.tensor_parallel.random

def snapshot():
    owners = [m for n, m in list(sys.modules.items()) if n.split(".")[0] in ("torch", "megatron", "numpy") and m]
    owners += [torch.Tensor, torch.nn.Module, torch.device]
    kinds = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, type)
    return {{(getattr(o, "__name__", repr(o)), k): v for o in owners for k, v in list(vars(o).items())
             if isinstance(v, kinds)}}

before = snapshot()
assert len(before) > 5000, len(before)
for name in {modules!r}:
    importlib.import_module(name)
after = snapshot()
changed = sorted(key for key in before if after.get(key) is not before[key])
print("CHANGED", changed)
"""
    result = run_code(code)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "CHANGED []"


# What a module may call while it is imported: these make constants.
CONSTANT_MAKERS = {
    *("get_logger", "getLogger", "compile", "frozenset", "tuple", "set", "dict", "range", "Path", "resolve"),
    *("TypeVar", "NewType", "namedtuple", "with_name", "MappingProxyType", "float", "int", "bytes", "len"),
    *("Struct", "enumerate", "object", "sorted", "zip", "list", "Patches"),
}


def top_level_faults(path: Path) -> list[str]:
    faults = []
    for node in syntax_tree(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring, or a comment in the form of a string
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "__name__ == '__main__'"}:
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign):
            calls = [c for c in ast.walk(node) if isinstance(c, ast.Call)]
            own_classes = {n.name for n in syntax_tree(path).body if isinstance(n, ast.ClassDef)}
            for call in calls:
                name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
                if name not in CONSTANT_MAKERS | own_classes:
                    faults.append(f"{path}:{call.lineno}: calls {ast.unparse(call.func)} while it is imported")
            continue
        faults.append(f"{path}:{node.lineno}: {type(node).__name__} runs while it is imported")
    return faults


def test_top_levels_hold_definitions_and_constants_only() -> None:
    faults = [fault for path in python_files(PACKAGE, "tools", "examples") for fault in top_level_faults(path)]
    assert not faults, "\n".join(faults)
