"""The notebook of the Python interface runs from its first cell to its last and says what it shows.

`python tests/e2e/test_notebook.py` executes it anew and writes what its cells say into the file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "python.ipynb"
MACHINE = "machine-dependent"
"""Tag of cells whose numbers follow from rounding, which differs from one processor to another."""


def code_cells() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return notebook, [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def said(source: str, names: dict[str, Any]) -> str:
    """What a cell prints, and the value of its last line, as a notebook shows them. Standard error is not kept."""
    tree, out = ast.parse(source), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(out):
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return out.getvalue() + ("" if value is None else f"{value!r}\n")


def shown(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"])


def test_the_notebook_runs_and_says_what_it_shows(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, cells = code_cells()
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        text = said("".join(cell["source"]), names)
        if MACHINE in cell["metadata"].get("tags", ()):
            assert len(text.splitlines()) == len(shown(cell).splitlines())
        else:
            assert text == shown(cell)
    assert (tmp_path / "runs" / "notebook" / "model" / "model.safetensors").is_file()


if __name__ == "__main__":
    written, cells = code_cells()
    names: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["PYTHONWARNINGS"] = "ignore"
        for number, cell in enumerate(cells, 1):
            text = said("".join(cell["source"]), names)
            lines = text.splitlines(keepends=True)
            cell["execution_count"] = number
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    NOTEBOOK.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(cells)} cells\n")
