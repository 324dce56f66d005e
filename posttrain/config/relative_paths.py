"""Paths in a recipe that is used from another folder than the one it was written for, and names that were mistyped."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from posttrain.config.foreign_files import read_json

Model = TypeVar("Model", bound=BaseModel)

PATHS = ("path", "chat_template")
"""Keys whose text may be a path of this machine, beside those of type `ModelPath`."""

_MODEL = "folder or Hub id of a model"
_ENDINGS = re.compile(r"(?<=.)(?:\.[A-Za-z]+)+$")

ModelPath = Annotated[str, _MODEL]
"""The type of a method's parameter that names a further model."""


def holds_a_model(info: FieldInfo) -> bool:
    """Whether a field of a section is a `ModelPath`, or one that may be left out."""
    members = [info.metadata, *(getattr(member, "__metadata__", ()) for member in get_args(info.annotation))]
    return any(_MODEL in metadata for metadata in members)


def models_of(section: BaseModel) -> dict[str, str]:
    """The further models that a section names, by field; those of sections within it by dotted field."""
    found: dict[str, str] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= {f"{name}.{inner}": path for inner, path in models_of(value).items()}
        elif holds_a_model(info) and value is not None:
            found[name] = value
    return found


def named_by(method: BaseModel, path: str) -> str:
    """The recipe's key by which its section `method` names a further model."""
    return next(f"method.{field}" for field, named in models_of(method).items() if named == path)


def from_folder(section: Model, folder: Path) -> Model:
    """The same section with its relative paths as seen from `folder`, as far as they lead somewhere from there.

    A file of the same name here is another one.

    Args:
        section: a recipe or a part of one.
        folder: where it was used before.
    """
    changed: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        found = _moved(value, folder) if name in PATHS or holds_a_model(info) else _inner(value, folder)
        if found is not value:
            changed[name] = found
    return section.model_copy(update=changed) if changed else section


def started_in(run_dir: Path) -> Path:
    """The folder that a run was started from, which its recipe's relative paths are seen from."""
    file = run_dir / "environment.json"
    known = read_json(file) if file.is_file() else {}
    return Path(known.get("folder", "."))


def nearest_local(path: str) -> str:
    """`did you mean ...?` for a name that looks like that of a file or folder here; empty where none does."""
    wanted = Path(path).expanduser()
    folder = wanted.parent
    if not folder.is_dir():
        return ""
    # Without their endings, which make any two of one kind alike: `nofile.jsonl` is no `gold.jsonl`.
    names = {_ENDINGS.sub("", entry.name): entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    close = difflib.get_close_matches(_ENDINGS.sub("", wanted.name), names, n=1)
    return f"did you mean {str(folder / names[close[0]])!r}, which is here?" if close else ""


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
    relative = Path(value).expanduser()
    if relative.is_absolute() or folder.resolve() == Path.cwd() or not (folder / relative).exists():
        return value
    return str(folder / relative)
