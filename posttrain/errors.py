"""Errors that a user can cause. Each carries what is wrong, where, and what to do; the CLI prints no traceback.

Anything else that escapes is a defect of posttrain and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PosttrainError(Exception):
    """Base of all user errors.

    Args:
        what: one sentence that says what is wrong.
        where: file, line, key, row or column; empty when there is no location.
        hint: the nearest valid choice or the next thing to do; empty when there is none.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.hint}" if self.hint else text


class RecipeError(PosttrainError):
    """A recipe that cannot be read or whose keys are unknown, of the wrong type or without effect."""


class RecipeErrors(RecipeError):
    """Several recipe errors found in one pass, so that a user mends them in one go."""

    def __init__(self, errors: Sequence[PosttrainError]) -> None:
        super().__init__(f"{len(errors)} errors in the recipe")
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class BatchError(RecipeError):
    """Batch numbers that do not divide; the hint names the nearest valid ones."""


class NeedsError(RecipeError):
    """A method whose needs the recipe does not meet, or a section the method would not read."""


class DataError(PosttrainError):
    """A missing file, empty file, missing column or bad row; `where` names file, line and column."""


class ModelError(PosttrainError):
    """A model or tokenizer that is missing, unsafe to load, or unfit for the job."""


class StackError(PosttrainError):
    """A missing extra, a package outside the tested range, or a launcher set to what is not supported."""


class StateError(PosttrainError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class ResourceError(PosttrainError):
    """Memory or disk space that ran out, or another rank that has gone."""


class LostRankError(ResourceError):
    """Another rank has gone. Said at once where it is found, as the launcher ends this process within moments."""


class VerifierError(PosttrainError):
    """A verifier that cannot go on: a judge without budget or that nobody answers for."""


class WorldError(PosttrainError):
    """An environment that cannot be loaded, or that fails too often to learn from."""


class PluginError(PosttrainError):
    """A plugin that is not there, that raises, or that registers a name which is taken."""


class EngineError(PosttrainError):
    """A rollout engine that cannot start or answered with something it must not."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean X?` for the closest of `choices`, or the list of them when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(choices) if choices else ""
