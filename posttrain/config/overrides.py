"""Dotted overrides from the command line: `training.max_steps=50`, `evaluation.benchmarks.0.name=x`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.config.locations import Locations, Path, dotted, raise_all
from posttrain.config.yaml_file import read_text
from posttrain.errors import RecipeError


def apply_overrides(data: dict[str, Any], locations: Locations, overrides: Sequence[str]) -> None:
    """Change `data` and `locations` in place. Values are YAML. Later overrides win.

    Whether a key is known is left to validation, which then names the override as the place.

    Raises:
        RecipeError: an override without `=`, with a value that is not YAML, or through something that has no keys.
    """
    errors = []
    for override in overrides:
        try:
            _apply(data, locations, override)
        except RecipeError as error:
            errors.append(error)
    raise_all(errors)


def _apply(data: dict[str, Any], locations: Locations, override: str) -> None:
    place = f"override {override!r}"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            "an override is `section.key=value`", where=place, hint="for example training.max_steps=50, without spaces"
        )
    if not text.strip():
        raise RecipeError("no value", where=place, hint=f"write {key}=null to unset it, or {key}='\"\"' for empty text")
    try:
        value, below = read_text(text, place)
    except RecipeError as error:
        hint = "the value is read as YAML: put quotes inside the quotes of the shell, as in 'key=\"[a-z]+: \"'"
        raise RecipeError(error.what, where=place, hint=hint) from error

    container: Any = data
    path: Path = ()
    for part in parts[:-1]:
        step = _step(container, part, path, place)
        path = (*path, step)
        if isinstance(container, dict) and container.get(step) is None:
            container[step] = {}
            locations.replace(path, place, Locations(place))
        container = container[step]
    step = _step(container, parts[-1], path, place)
    container[step] = value
    locations.replace((*path, step), place, below)


def _step(container: Any, part: str, path: Path, place: str) -> str | int:
    """The key or list position that `part` means in `container`."""
    if isinstance(container, dict):
        return int(part) if part.isdecimal() else part
    if isinstance(container, list):
        if not part.isdecimal() or int(part) >= len(container):
            hint = f"positions 0 to {len(container) - 1}" if container else "the list is empty"
            raise RecipeError(f"{dotted(path)} is a list and has no entry {part!r}", where=place, hint=hint)
        return int(part)
    raise RecipeError(f"{dotted(path)} is {container!r} and has no keys, so {part!r} cannot be set in it", where=place)
