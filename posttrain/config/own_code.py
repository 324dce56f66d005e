"""Code of the user's own that a recipe names: where it is and what it defines, without running any of it."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from posttrain.bounded_files import read_bytes
from posttrain.errors import nearest


@dataclass(frozen=True, slots=True)
class OwnCode:
    """What `file.py:name` or `package.module:name` leads to.

    Attributes:
        place: the file, or the dotted name of a module.
        name: of a function or class in it.
        file: the source; None for a module whose source cannot be read.
    """

    place: str
    name: str
    file: Path | None

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"

    def digest(self) -> str:
        """SHA-256 over the source and the name. What the source imports is not in it."""
        source = b"" if self.file is None else read_bytes(self.file)
        return hashlib.sha256(source + b"\0" + self.name.encode()).hexdigest()


def digests(sections: Iterable[Any]) -> dict[str, str]:
    """Hashes of the user's own code that verifiers and environments of a recipe run, by what names it there."""
    return {str(code): code.digest() for section in sections for code in section.codes}


def find(written: str, folder: Path | None = None) -> OwnCode:
    """The code that a recipe names.

    Args:
        written: `file.py:name`, with a path from `folder` or else from the working directory, or `package.module:name`.
        folder: the recipe's.

    Raises:
        ValueError: there is no such file, module or name; says the nearest one.
    """
    place, colon, name = written.rpartition(":")
    if not colon or not name.isidentifier() or not place:
        raise ValueError(f"{written!r} is not of the form `file.py:name` or `package.module:name`")
    file: Path | None
    if place.endswith(".py") or "/" in place:
        file = find_file(place, folder)
        place = str(file)
    else:
        file = _source(place)
    if file is not None:
        known = _defined(file)
        if name not in known:
            raise ValueError(f"{place} defines no {name!r}; {nearest(name, known) or 'it defines nothing'}")
    return OwnCode(place, name, file)


def _found(written: str, info: ValidationInfo) -> str:
    return str(find(written, (info.context or {}).get("folder")))


CodeName = Annotated[str, AfterValidator(_found)]
"""The type of a key that names code as `find` takes it, from the recipe's folder; read back, the place is whole."""


def load(place: str) -> ModuleType:
    """Run the code of a file or module, once per process. A file's neighbours can be imported from it by their names.

    Raises:
        Exception: whatever the code raises.
    """
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place).resolve()
    name = f"posttrain_own_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None  # of a path that ends in .py there is always one
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def in_short(error: BaseException) -> str:
    """An exception of the user's code in one line: `ValueError: no number (rewards.py, line 12)`."""
    frames = user_frames(error)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Its traceback without what is ours or Python's own importing."""
    package = str(Path(__file__).parents[1])
    hidden = (package, "<frozen importlib", str(Path(importlib.__file__).parent))
    return [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(hidden)]


def find_file(place: str, folder: Path | None) -> Path:
    """The file that a recipe names, from its folder or else from the working directory.

    Raises:
        ValueError: there is none; says the nearest one.
    """
    path = Path(place).expanduser()
    tried = [base / path for base in (folder, Path.cwd()) if base is not None]
    for candidate in tried:
        if candidate.is_file():
            return candidate.resolve()
    beside = {file.name for candidate in tried if candidate.parent.is_dir() for file in candidate.parent.glob("*.py")}
    folders = " nor in ".join(dict.fromkeys(str(candidate.parent.resolve()) for candidate in tried))
    raise ValueError(
        f"there is no file {path.name!r} in {folders}; {nearest(path.name, beside) or 'no .py file there'}"
    )


def module_spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module is, without importing the packages around it as `importlib.util.find_spec` does."""
    whole, spec = "", None
    for part in module.split("."):
        if spec is not None and spec.submodule_search_locations is None:  # a module, which has no parts
            return None
        whole = f"{whole}.{part}" if whole else part
        if spec is None:
            spec = importlib.util.find_spec(whole)
        else:
            spec = importlib.machinery.PathFinder.find_spec(whole, spec.submodule_search_locations)
        if spec is None:
            return None
    return spec


def _source(module: str) -> Path | None:
    """The file of a module. Nothing is imported, not the packages around it either."""
    spec = module_spec(module)
    if spec is None:
        raise ValueError(f"there is no module {module!r}; a file is named as `file.py:name`")
    plain = isinstance(spec.loader, importlib.machinery.SourceFileLoader)
    return Path(spec.origin) if plain and spec.origin else None


def _defined(file: Path) -> set[str]:
    """Names that a source binds at its top level."""
    try:
        tree = ast.parse(read_bytes(file), str(file))
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from error
    except (RecursionError, MemoryError) as error:  # as Python's parser says it
        raise ValueError(f"{file}: nested too deeply") from error
    return {name for statement in _top_level(tree.body) for name in _bound(statement)}


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            inner = [*statement.body, *getattr(statement, "orelse", []), *getattr(statement, "finalbody", [])]
            for handler in getattr(statement, "handlers", []):
                inner += handler.body
            yield from _top_level(inner)


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
