"""A recipe that holds objects of a Python program, written down: rows in memory and reward functions become files."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.data.messages import without_filled
from posttrain.errors import DataError, RecipeError
from posttrain.safe_files import file_atomic, refuse_linked_folders, write_text_atomic

FOLDER = "inputs"
"""Where they are written, within the run's folder."""

SHIM = '''"""A reward that was given as an object. Its source had the hash {digest}."""

from pathlib import Path

import dill

{name} = dill.loads(Path(__file__).with_suffix(".pkl").read_bytes())
'''


def written_down(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with paths where it held rows or functions; they are written into `<output>/inputs`.

    Raises:
        RecipeError: there are such objects and no `output`.
        DataError: rows that JSON cannot hold.
    """
    result = {key: _copied(value) for key, value in recipe.items()}
    data = result.get("data")
    sections: dict[str, Any] = data if isinstance(data, dict) else {}
    for name, section in list(sections.items()):
        sources = section if _is_mixture(section) else [section]
        written = [
            _source(recipe, source, f"{name}-{number}" if number else name) for number, source in enumerate(sources)
        ]
        sections[name] = written if _is_mixture(section) else written[0]
    verifiers = result.get("verifier")
    if callable(verifiers):
        verifiers = result["verifier"] = [verifiers]
    listed: list[Any] = verifiers if isinstance(verifiers, list) else []
    for number, section in enumerate(listed):
        if callable(section):
            section = listed[number] = {"type": "python", "function": section}
        if isinstance(section, dict) and callable(section.get("function")):
            _need_output(recipe, f"verifier.{number}")
            section["function"] = _place_of(section["function"], _folder(recipe))
    return result


def _is_mixture(section: Any) -> bool:
    """Whether a section lists sources, and not rows."""
    kinds = ("path", "task", "reasoning_gym")
    return isinstance(section, list) and all(
        _rows(one) is not None or (isinstance(one, dict) and any(kind in one for kind in kinds)) for one in section
    )


def _source(recipe: Mapping[str, Any], source: Any, name: str) -> Any:
    """A source of rows, with a path for what is in memory."""
    source = source if _rows(source) is None else {"path": source}
    if isinstance(source, dict) and (rows := _rows(source.get("path"))) is not None:
        _need_output(recipe, f"data.{name}")
        source = source | {"path": str(_write_rows(rows, _folder(recipe) / f"{name}.jsonl", f"data.{name}"))}
    return source


def _folder(recipe: Mapping[str, Any]) -> Path:
    output = Path(str(recipe.get("output", "")))
    refuse_linked_folders(output)
    return output / FOLDER


def _copied(value: Any) -> Any:
    """Sections are copied, because they are changed; what they hold is not."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _need_output(recipe: Mapping[str, Any], where: str) -> None:
    if not recipe.get("output"):
        raise RecipeError("an object is written into the run's folder", where=where, hint="give the recipe an `output`")


def _rows(value: Any) -> Iterable[Mapping[str, Any]] | None:
    """Rows of a `datasets.Dataset`, a DataFrame, or a list of mappings; None for anything else."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return value
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # pandas
        return [without_filled(row) for row in value.to_dict("records")]
    if hasattr(value, "column_names") and hasattr(value, "features"):  # datasets, one split
        return (without_filled(dict(row)) for row in value)
    return None


def _write_rows(rows: Iterable[Mapping[str, Any]], path: Path, where: str) -> Path:
    lines = []
    for number, row in enumerate(rows):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False))
        except TypeError as error:
            raise DataError(f"row {number} cannot be written down: {error}", where=where) from error
    if not lines:
        raise DataError("no rows", where=where)
    write_text_atomic(path, "\n".join(lines) + "\n")
    return path.resolve()


def _importable(module: ModuleType) -> bool:
    """Whether another process finds it by its name."""
    if module.__name__ == "__main__":
        return False
    try:
        spec = importlib.util.find_spec(module.__name__)
    except (ImportError, ValueError):  # made by hand, or below a package that is none
        return False
    return spec is not None and spec.origin == getattr(module, "__file__", None)


def _place_of(function: Callable[..., Any], folder: Path) -> str:
    """`module:name` for what can be imported, else a file that brings the object back.

    What a script or notebook defines cannot be imported by a worker without running it again.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    module = sys.modules.get(getattr(function, "__module__", ""))
    if module is not None and getattr(module, name, None) is function and _importable(module):
        return f"{module.__name__}:{name}"
    import dill

    name = name.rpartition(".")[2]
    name = name if name.isidentifier() else "reward"
    pickled = dill.dumps(function, recurse=True)
    try:
        source = inspect.getsource(function if inspect.isroutine(function) else type(function)).encode()
    except (OSError, TypeError):  # typed at a prompt
        source = pickled
    file = folder / f"{name}.py"
    with file_atomic(file.with_suffix(".pkl")) as beside:
        beside.write_bytes(pickled)
    write_text_atomic(file, SHIM.format(name=name, digest=hashlib.sha256(source).hexdigest()))
    return f"{file.resolve()}:{name}"
