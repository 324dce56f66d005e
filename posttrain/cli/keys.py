"""Every key of a recipe, from the schema itself: `posttrain keys`. `reference` makes pages of the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel

from posttrain.cli.tables import parameter_rows, print_table
from posttrain.config.registered import RegisteredSection, sections_of
from posttrain.config.schema import Recipe
from posttrain.errors import RecipeError, nearest
from posttrain.terminal import say

HEADER = ("key", "default", "type", "meaning")


@dataclass(slots=True)
class KeySection:
    """A part of a recipe.

    Attributes:
        config: what validates it.
        paths: dotted keys under which it may stand, `verifier[]` for an entry of a list; empty for the top level.
    """

    config: type[BaseModel]
    paths: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Where it stands, and what tells it from others that may stand there."""
        return self._titled(", ".join(self.paths))

    @property
    def short(self) -> str:
        """The first of those places."""
        more = len(self.paths) - 1
        return self._titled(self.paths[0] if self.paths else "") + (f", {more} more" if more > 0 else "")

    def _titled(self, places: str) -> str:
        kind = self._kind
        return places + ("" if kind is None else f" (type: {kind})") if places else "top level"

    @property
    def _kind(self) -> str | None:
        """The only value of its key `type`, which says which of several sections it is."""
        info = self.config.model_fields.get("type")
        chosen = get_args(info.annotation) if info is not None else ()
        return chosen[0] if len(chosen) == 1 else None

    @property
    def meaning(self) -> str:
        """First paragraph of its docstring; empty where it has none of its own."""
        own = self.config.__doc__ if "__doc__" in vars(self.config) else None
        return " ".join(inspect.cleandoc(own).split("\n\n")[0].split()) if own else ""

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """(key, default, type and range, meaning) of every key, a section's being its docstring."""
        rows = []
        for name, default, kind, meaning in parameter_rows(self.config):
            inner = [each for each, _ in _configs(self.config.model_fields[name].annotation)]
            if not meaning and inner:
                meaning = KeySection(inner[0]).meaning
            if name == "type" and issubclass(self.config, RegisteredSection):  # in Python the class says it
                default = "required"
            rows.append((name, default, kind, "this section" if name == "type" and self._kind else meaning))
        return rows


def sections(root: type[BaseModel] = Recipe) -> list[KeySection]:
    """All sections of a recipe, or of another file, in the order of its keys, each once."""
    found: dict[type[BaseModel], KeySection] = {}

    def visit(config: type[BaseModel], path: str) -> None:
        known = config in found
        section = found.setdefault(config, KeySection(config))
        if path and path not in section.paths:
            section.paths.append(path)
        if known:
            return
        for name, info in config.model_fields.items():
            for inner, in_list in _configs(info.annotation):
                entry = f"{name}[]" if in_list and not _alone(info.annotation) else name
                visit(inner, f"{path}.{entry}" if path else entry)

    visit(root, "")
    return list(found.values())


def _configs(annotation: Any, in_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The sections that a type may be, and whether within a list."""
    if registered := sections_of(annotation):
        yield from ((section, in_list) for section in registered)
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, in_list
        return
    for part in get_args(annotation):
        yield from _configs(part, in_list or getattr(annotation, "__origin__", None) is list)


def _alone(annotation: Any) -> bool:
    """Whether a section may also stand there without a list."""
    return any(not in_list for _, in_list in _configs(annotation))


def print_keys(path: str | None) -> None:
    """The keys of the section at a dotted path; without one, all sections.

    Raises:
        RecipeError: there is no such section; names the nearest.
    """
    every = sections()
    if path is None:
        print_table([(each.short, each.meaning) for each in every], header=("section", "meaning"))
        say("\nposttrain keys SECTION shows the keys; posttrain methods NAME those of a method")
        return
    asked = path.removesuffix("[]")
    chosen = [each for each in every if asked in [known.removesuffix("[]") for known in each.paths]]
    if not chosen:
        known = sorted({known.removesuffix("[]") for each in every for known in each.paths})
        raise RecipeError(f"no section {path!r}", hint=nearest(path, known))
    for number, section in enumerate(chosen):
        say(("\n" if number else "") + section.title + (f": {section.meaning}" if section.meaning else ""))
        print_table(section.rows, header=HEADER)
