"""The house rules that ruff and mypy cannot hold: sizes, documented contracts, no stubs.

Ruff holds the others (pyproject.toml): no print outside the command line, no bare except, no
relative import, no TODO left behind, and no heavy module imported at the top of a file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "blocklayer"
MODULES = sorted(SOURCE.rglob("*.py"))

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
CONTRACTS = ("graph", "api", "testing")
"""Where other people write code against what they read: every public name there says what it is."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def floor(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def place(path: Path, node: ast.AST | None = None) -> str:
    line = getattr(node, "lineno", 1)
    return f"{path.relative_to(SOURCE.parent.parent)}:{line}"


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def test_every_module_opens_with_its_one_job(trees: dict[Path, ast.Module]) -> None:
    assert MODULES, f"no modules under {SOURCE}"
    assert [place(path) for path, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_no_file_is_too_long() -> None:
    lengths = {place(path): len(path.read_bytes().splitlines()) for path in MODULES}
    assert {where: n for where, n in lengths.items() if n > FILE_LINES_MAX} == {}


def test_no_function_is_too_long(trees: dict[Path, ast.Module]) -> None:
    lengths = {
        f"{place(path, node)} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, Function)
    }
    assert {where: n for where, n in lengths.items() if n > FUNCTION_LINES_MAX} == {}


def test_public_contracts_are_documented(trees: dict[Path, ast.Module]) -> None:
    undocumented = [
        f"{place(path, node)} {node.name}"
        for path, tree in trees.items()
        if floor(path) in CONTRACTS
        for node in public_definitions(tree)
        if not ast.get_docstring(node)
    ]
    assert undocumented == []


def test_nothing_is_advertised_and_not_built(trees: dict[Path, ast.Module]) -> None:
    stubs = [
        place(path, node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]
    assert stubs == []
