"""Plugins: files and installed packages whose code registers methods, tasks, metrics and callbacks when it is loaded.

A recipe names them under `plugins`, a command with `--plugin`, and an installed package with the entry-point group
`posttrain.plugins`. They are loaded before a recipe is validated, because its sections may be theirs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from posttrain.bounded_files import read_bytes
from posttrain.config.own_code import find_file, in_short, load, module_spec
from posttrain.config.yaml_file import read_file
from posttrain.errors import PluginError

GROUP = "posttrain.plugins"

loaded: list[str] = []
"""What has been loaded in this process, by absolute path or name of the module, for processes that it starts."""


def load_plugins(written: Sequence[str], *, where: str, folder: Path | None = None) -> list[str]:
    """Load those of installed packages, and files (`my_method.py`) or modules (`package.module`) by name.

    Args:
        where: what names them, for error messages.
        folder: from which paths are taken, before the working directory.

    Returns:
        The names, files as absolute paths.

    Raises:
        PluginError: one is not there, raises, or registers a name that is taken.
    """
    _load_installed()
    return [_load(name, where, folder) for name in written]


def named_plugins(recipe: Path, overrides: Sequence[str]) -> bool:
    """Whether a recipe names plugins; for who must know before it is read."""
    return any(text.startswith("plugins") for text in overrides) or bool(read_file(recipe)[0].get("plugins"))


def have_plugins() -> bool:
    """Whether one is loaded already, or will be because a package is installed that brings it."""
    return bool(loaded) or bool(importlib.metadata.entry_points(group=GROUP))


def digest(name: str) -> str:
    """SHA-256 of a plugin's source; of a module without one, of its name."""
    spec = None if name.endswith(".py") else module_spec(name)
    file = Path(name) if spec is None else Path(spec.origin or "")
    return hashlib.sha256(read_bytes(file) if file.is_file() else name.encode()).hexdigest()


def _load(name: str, where: str, folder: Path | None) -> str:
    try:
        place = str(find_file(name, folder)) if name.endswith(".py") or "/" in name else name
    except ValueError as error:
        raise PluginError(str(error), where=where) from error
    try:
        load(place)
    except PluginError as error:
        raise PluginError(error.what, where=f"{where}: {place}", hint=error.hint) from error
    # Whatever a plugin raises while it is loaded is a mistake in it, to be shown as such.
    except Exception as error:
        raise PluginError(f"the plugin {place} cannot be loaded: {in_short(error)}", where=where) from error
    if place not in loaded:
        loaded.append(place)
    return place


@cache
def _load_installed() -> None:
    for entry in importlib.metadata.entry_points(group=GROUP):
        _load(entry.value.partition(":")[0], f"installed package {entry.dist.name if entry.dist else entry.name}", None)
