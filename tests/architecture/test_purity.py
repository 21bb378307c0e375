"""Direction has one home, and so have the patches: no flip outside direction.py, no patch outside engine/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGE, python_files, syntax_tree

CODE = (PACKAGE, "tools", "examples")
FLIP_HOME = Path(PACKAGE, "direction.py")
PATCH_HOME = Path(PACKAGE, "engine")
# Reversals of something that is not a sequence of ids: (file, text of the expression) -> why.
FALLBACK = f"{PACKAGE}/ops/fallback.py"
NOT_IDS: dict[tuple[str, str], str] = {
    (FALLBACK, text): "queries, keys, values and outputs: torch has causal attention only"
    for text in (
        *("q_BSHD.flip(1)", "k_BSGD.flip(1)", "v_BSGD.flip(1)"),
        "attend(q_BSHD.flip(1), k_BSGD.flip(1), v_BSGD.flip(1), scale).flip(1)",
    )
}


def flips(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every expression that can reverse a sequence: (line, text)."""
    own_function = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in {f"{PACKAGE}.direction", PACKAGE}
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Slice) and node.step is not None and _is_negative(node.step):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                is_flip = function.id in {"reversed", "flip", "fliplr", "flipud"} and function.id not in own_function
                is_flip |= function.id == "range" and len(node.args) == 3 and _is_negative(node.args[2])
            else:
                is_flip = isinstance(function, ast.Attribute) and function.attr in {
                    "flip",
                    "fliplr",
                    "flipud",
                    "reverse",
                }
                root = function.value if isinstance(function, ast.Attribute) else None
                is_flip &= not (isinstance(root, ast.Name) and root.id in own_function)
            if is_flip:
                yield node.lineno, ast.unparse(node)


def _is_negative(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


@pytest.mark.parametrize(
    ("code", "is_flip"),
    [
        ("x = ids[::-1]", True),
        ("x = ids[..., ::-1]", True),
        ("x = ids[n - 1 :: -1]", True),
        ("x = torch.flip(ids, [0])", True),
        ("x = ids.flip(-1)", True),
        ("x = np.flip(ids)", True),
        ("x = list(reversed(ids))", True),
        ("ids.reverse()", True),
        ("x = [ids[i] for i in range(n - 1, -1, -1)]", True),
        ("from numpy import flip\nx = flip(ids)", True),
        ("from megatron_ledom.direction import flip\nx = flip(ids)", False),
        ("from megatron_ledom import direction\nx = direction.flip(ids)", False),
        ("x = ids[::2]", False),
        ("x = sorted(scores, reverse=True)", False),
        ("x = ids[-1:]", False),
    ],
)
def test_the_flip_rule_itself(code: str, is_flip: bool) -> None:
    assert bool(list(flips(ast.parse(code)))) is is_flip


def test_ids_are_flipped_in_one_module_only() -> None:
    assert list(flips(syntax_tree(FLIP_HOME))), "the rule no longer recognises the flips of direction.py"
    found = {
        (str(path), text): line
        for path in python_files(*CODE)
        if path != FLIP_HOME
        for line, text in flips(syntax_tree(path))
    }
    faults = [f"{path}:{line}: {text}" for (path, text), line in found.items() if (path, text) not in NOT_IDS]
    assert not faults, "flip ids through megatron_ledom/direction.py, or explain in NOT_IDS:\n" + "\n".join(faults)
    assert set(NOT_IDS) <= set(found), f"no longer there: {sorted(set(NOT_IDS) - set(found))}"


def patches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every change of something imported: attributes assigned or deleted, `setattr`, `sys.modules[...] =`."""
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}

    def is_foreign(node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and node.id in imported

    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in [t for outer in targets for t in (outer.elts if isinstance(outer, ast.Tuple) else [outer])]:
            is_table = isinstance(target, ast.Subscript) and (
                ast.unparse(target.value) == "sys.modules" or ast.unparse(target.value).endswith("__dict__")
            )
            if (isinstance(target, ast.Attribute) or is_table) and is_foreign(target):
                yield target.lineno, ast.unparse(target)
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            if name in {"setattr", "delattr"} and is_foreign(node.args[0]):
                yield node.lineno, ast.unparse(node)
            if name.split(".")[-1] in {"patch", "monkeypatch"} or name.endswith("patch.object"):
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    ("code", "is_patch"),
    [
        ("import torch\ntorch.empty = f", True),
        ("import torch\ntorch.cuda.synchronize, x = f, 1", True),
        ("from megatron.core import optimizer\nsetattr(optimizer, 'Adam', f)", True),
        ("from torch import Tensor\nTensor.cuda = f", True),
        ("def g():\n    import torch\n    torch.backends.mkldnn.enabled = False", True),
        ("import sys\nsys.modules['apex'] = None", True),
        ("import torch\ntorch.__dict__['x'] = 1", True),
        ("from unittest import mock\nmock.patch('torch.empty')", True),
        ("class A:\n    def __init__(self):\n        self.x = 1", False),
        ("import torch\nx = torch.zeros(3)\nx.requires_grad = True", False),
        ("import os\nos.environ['A'] = 'b'", False),
    ],
)
def test_the_patch_rule_itself(code: str, is_patch: bool) -> None:
    assert bool(list(patches(ast.parse(code)))) is is_patch


def test_nothing_is_patched_outside_engine() -> None:
    faults = [
        f"{path}:{line}: {text}"
        for path in python_files(*CODE)
        if PATCH_HOME not in path.parents
        for line, text in patches(syntax_tree(path))
    ]
    assert not faults, "\n".join(faults)
