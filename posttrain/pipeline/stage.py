"""What a stage of a pipeline is: its config without references, what is checked, what it makes, what its key is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

import posttrain
from posttrain.config.locations import Locations
from posttrain.config.trust import Trusted, trusted
from posttrain.pipeline.cache import content_hashes, installed_versions
from posttrain.pipeline.inputs import local_paths
from posttrain.pipeline.schema import StageEntry, substitute

Resolve = Callable[[str, str], str]
"""(stage, artefact) to the text that stands for it: a path, or a key."""


def as_written(stage: str, artefact: str) -> str:
    """The `Resolve` that leaves references as they are, for checks before any artefact exists."""
    return f"${{{stage}.{artefact}}}"


class Stage(ABC):
    """One stage of a pipeline.

    Class attributes:
        Config: type of the value under the kind's key in the pipeline file.
        artefacts: artefact name -> path relative to the stage folder.
        expects: dotted key of the config -> the artefact that a reference there must name.
        takes_set: whether `set` has a meaning.
        code_version: raised when the kind's own code changes what it makes.
        packages: distributions whose version is part of the key.
        without_effect: dotted keys of the resolved config that do not change the result, so are no part of the key.

    Args:
        entry: the stage as written.
        folder: where its artefacts go.
        file: the pipeline file.
        number: position of the stage, from 0.
        locations: places of the pipeline file's keys.
        run_code: load plugins and code of models; without it they may be announced, and the rest checked.
    """

    Config: ClassVar[Any]
    artefacts: ClassVar[Mapping[str, str]]
    expects: ClassVar[Mapping[str, str]] = {}
    takes_set: ClassVar[bool] = False
    code_version: ClassVar[int] = 1
    packages: ClassVar[tuple[str, ...]] = ()
    without_effect: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, entry: StageEntry, folder: Path, file: Path, number: int, locations: Locations, run_code: bool = True
    ) -> None:
        self.entry, self.folder, self.file, self.number, self.locations = entry, folder, file, number, locations
        self.run_code = run_code

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def place(self) -> str:
        """Where the pipeline file has this stage."""
        return self.locations.place(("stages", self.number, "name"))

    def resolved(self, resolve: Resolve) -> Any:
        """The full config with every reference replaced.

        Raises:
            RecipeError: it is not valid.
        """
        return self.Config.model_validate(substitute(self.entry.config.model_dump(exclude_unset=True), resolve))

    def trusted(self) -> list[Trusted]:
        """What a run of it has one trust."""
        return trusted(self.resolved(as_written), self.file.parent)

    @abstractmethod
    def check(self, earlier: Mapping[str, Stage]) -> None:
        """Raise a PosttrainError for whatever can be known to be wrong before the earlier stages have run."""

    @abstractmethod
    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        """Make the artefacts.

        Args:
            resolve: gives the paths of earlier artefacts.
            interrupted: the folder holds what an earlier attempt with the same key left there.
        """

    def can_continue(self) -> bool:
        """Whether what an interrupted attempt left in the folder can be worked on; if not, it is moved aside."""
        return True

    def conclude(self, resolve: Resolve, console: Console) -> None:
        """Print what the pipeline found out, after the last stage."""
        return

    def next_steps(self) -> list[tuple[str, str]]:
        """(label, path or command) of what to look at."""
        return []

    def inputs(self, resolve: Resolve) -> dict[str, Any]:
        """What the key is made of; JSON values.

        Args:
            resolve: gives a text with the key of the referenced stage.
        """
        config = self.resolved(resolve)
        values = config.model_dump(mode="json")
        for path in self.without_effect:
            *sections, last = path.split(".")
            section = values
            for step in sections:
                section = section[step]
            section.pop(last)
        return {
            "kind": self.entry.kind,
            "code": self.code_version,
            "config": values,
            "files": content_hashes(local_paths(config)),
            "versions": {"posttrain": posttrain.__version__} | installed_versions(self.packages),
        }
