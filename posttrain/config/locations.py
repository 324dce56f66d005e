"""Where each key of a configuration was written, so that every complaint can name a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.errors import PosttrainError, RecipeErrors

Path = tuple[str | int, ...]
"""A key's place: mapping keys and list positions from the root."""


def dotted(path: Path) -> str:
    """`("evaluation", "benchmarks", 0)` as `evaluation.benchmarks.0`, the form that overrides use."""
    return ".".join(str(part) for part in path)


@dataclass(slots=True)
class Locations:
    """Where the keys of a configuration stand.

    Attributes:
        file: the configuration file, as the user named it.
        places: path to `file:line`, or to `override 'key=value'`.
    """

    file: str
    places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """`file:line` of the key, or of the nearest section around it that was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.file

    def where(self, path: Path) -> str:
        """Place and dotted path, as error messages show them."""
        return f"{self.place(path)}: {dotted(path)}" if path else self.file

    def replace(self, path: Path, place: str, below: Locations) -> None:
        """Forget what was under `path` and put the places of a new value there."""
        for old in [known for known in self.places if known[: len(path)] == path]:
            del self.places[old]
        self.places[path] = place
        for inner in below.places:
            self.places[path + inner] = place


def raise_all(errors: Sequence[PosttrainError]) -> None:
    """Raise nothing, the only error, or all of them as one `RecipeErrors`."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RecipeErrors(errors)
