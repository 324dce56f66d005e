"""Rules of the house that a program can check: imports, pages and rows of methods, docstrings."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "posttrain"

FLOORS = [
    {"bounded_files", "errors", "imports", "lazy", "phases", "registry", "safe_files", "terminal"},
    {"config", "data", "environments", "objectives", "verifiers"},
    {"methods"},
    {"models", "rollouts", "state", "tracking"},
    {"evaluation"},
    {"trainers", "trl_compat"},
    {"pipeline", "contract", "api", "report"},
    {"study"},
    {"cli"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere but for annotations alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    hidden = {id(inner) for check in checks for inner in ast.walk(check)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_part_has_a_floor() -> None:
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert parts - {"__init__", "__main__", "__pycache__"} == set(FLOOR)


def test_imports_run_one_way() -> None:
    upward = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in PACKAGE.rglob("*.py")
        if file.parent != PACKAGE or file.stem in FLOOR
        for module in imported(file)
        if module.startswith("posttrain.")
        and FLOOR[module.split(".")[1]] > FLOOR[file.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    ]
    assert not upward


def test_no_modules_lean_on_each_other() -> None:
    """But in annotations: whatever is imported when it runs, later ones included, is below."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    below = {name: {each for each in imported(file) if each in files} for name, file in files.items()}
    while free := {name for name, modules in below.items() if not modules & below.keys()}:
        below = {name: modules for name, modules in below.items() if name not in free}
    assert not {name: modules & below.keys() for name, modules in below.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_and_a_row(name) -> None:
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
    assert f"[`{name}`](docs/methods/{name}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{name}]({name}.md)" in (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")


def public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes that others may use, those within classes too."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def test_a_name_of_a_class_means_one_thing() -> None:
    """`Config` is the section of whatever class it stands in."""
    places: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Config":
                places.setdefault(node.name, []).append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_docstrings_begin_with_a_sentence() -> None:
    headings = ("Args:", "Attributes:", "Class attributes:", "Raises:", "Returns:")
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in PACKAGE.rglob("*.py")
        for node in public(ast.parse(file.read_text(encoding="utf-8")))
        if (text := ast.get_docstring(node)) is not None
        and (text.startswith(headings) or not text.split("\n\n")[0].endswith((".", "?", ":", ")", "`")))
    ]
    assert not wrong


BY_OTHERS = {"posttrain.__main__", "posttrain.rollouts.vllm_key", "posttrain.verifiers.sandbox_runner"}
"""The command line itself, and what only our own programs start."""


def programs() -> list[str]:
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in PACKAGE.rglob("*.py")
        if re.search(r'^if __name__ == "__main__":', file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    return sorted(names - BY_OTHERS)


@pytest.mark.parametrize("module", programs())
def test_a_module_that_is_a_program_says_what_it_does_where_it_is_asked(module, monkeypatch, capsys, tmp_path) -> None:
    """And does not do it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
