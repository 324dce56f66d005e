"""Paths in a recipe that is used from another folder than the one it was written for, and names that were mistyped."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)

PATHS = ("path", "guide_model", "chat_template")
"""Keys whose text may be a path of this machine."""


def from_folder(section: Model, folder: Path) -> Model:
    """The same section with the relative paths that lead nowhere here, and somewhere from `folder`, as seen from there.

    Args:
        section: a recipe or a part of one.
        folder: where it was used before.
    """
    changed: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        found = _moved(value, folder) if name in PATHS else _inner(value, folder)
        if found is not value:
            changed[name] = found
    return section.model_copy(update=changed) if changed else section


def started_in(run_dir: Path) -> Path:
    """The folder that a run was started from, which its recipe's relative paths are seen from."""
    file = run_dir / "environment.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Path(known.get("folder", "."))


def nearest_local(path: str) -> str:
    """`did you mean ...?` for a name that looks like that of a file or folder here; empty where none does."""
    wanted = Path(path).expanduser()
    folder = wanted.parent
    if not folder.is_dir():
        return ""
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    stems = {Path(name).name.split(".")[0]: name for name in names}
    close = difflib.get_close_matches(wanted.name, [*names, *stems], n=1)
    return f"did you mean {str(folder / stems.get(close[0], close[0]))!r}, which is here?" if close else ""


def _inner(value: Any, folder: Path) -> Any:
    if isinstance(value, BaseModel):
        return from_folder(value, folder)
    if isinstance(value, list):
        moved = [_inner(each, folder) for each in value]
        return moved if any(a is not b for a, b in zip(moved, value, strict=True)) else value
    return value


def _moved(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        moved = [_moved(each, folder) for each in value]
        return moved if any(a is not b for a, b in zip(moved, value, strict=True)) else value
    if not isinstance(value, str) or "\n" in value:
        return value
    here = Path(value).expanduser()
    if here.is_absolute() or here.exists() or not (folder / here).exists():
        return value
    return str(folder / here)
