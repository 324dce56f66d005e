"""A data section with several sources: their names, and how often each is drawn from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.schema import FileSource, GymSource, Recipe, Source, Traces, TraceSource
from posttrain.config.verifier import VerifierConfig
from posttrain.errors import RecipeError


def parts(section: Source | Traces | Sequence[Source | Traces], name: str) -> list[tuple[str, Any]]:
    """The sources of a data section with their names: a single one bears the name of the section."""
    if not isinstance(section, list | tuple):
        return [(name, section)]
    named: dict[str, Any] = {}
    for source in section:
        wanted = source.source or _own_name(source)
        label, number = wanted, 1
        while label in named:
            number += 1
            label = f"{wanted}-{number}"
        named[label] = source
    return list(named.items())


Stage = tuple[int, dict[str, float]]
"""An optimizer step, from 0, and the share of the draws of each source from there on, summing to 1."""


def stages(section: Source | Traces | Sequence[Source | Traces], name: str) -> list[Stage] | None:
    """The weights of the sources over the steps of a run; None where the rows are simply put together.

    Raises:
        RecipeError: only some sources have a weight, or in some steps none has.
    """
    found = {label: source.weight for label, source in parts(section, name)}
    if not isinstance(section, list | tuple) or all(weight is None for weight in found.values()):
        return None
    if without := [label for label, weight in found.items() if weight is None]:
        raise RecipeError(
            f"{without[0]} has no weight, and other sources of the list have",
            where=f"data.{name}",
            hint="give every source one, or none",
        )
    by_step = {label: weight if isinstance(weight, dict) else {0: weight} for label, weight in found.items()}
    made: list[Stage] = []
    for start in sorted({0, *(step for weights in by_step.values() for step in weights)}):
        now = {label: _at(weights, start) for label, weights in by_step.items()}
        total = sum(now.values())
        if not total:
            raise RecipeError(
                f"no source has a weight from step {start} on",
                where=f"data.{name}",
                hint="steps count from 0; give one of them a weight there",
            )
        made.append((start, {label: weight / total for label, weight in now.items()}))
    return made


def _at(weights: Mapping[int, float], step: int) -> float:
    """The weight that holds at a step: that of the last step named up to there; 0 before the first."""
    named = [start for start in weights if start <= step]
    return weights[max(named)] if named else 0.0


def verifiers(recipe: Recipe) -> dict[str, list[VerifierConfig]]:
    """The verifiers of each source of problems, by its name; the recipe's where it has none of its own."""
    sources = [] if recipe.data.prompts is None else parts(recipe.data.prompts, "prompts")
    return {name: source.verifier or recipe.verifier or [] for name, source in sources}


def all_verifiers(recipe: Recipe) -> list[VerifierConfig]:
    """The recipe's verifiers, and those of single sources."""
    own = [source.verifier for _, source in parts(recipe.data.prompts, "prompts")] if recipe.data.prompts else []
    return [*(recipe.verifier or ()), *(verifier for several in own for verifier in several or ())]


def source_of(problem_id: str) -> str:
    """The name of the source of a row, from the id of its problem: `name/row number`."""
    return problem_id.rpartition("/")[0]


def _own_name(source: Source | Traces) -> str:
    if isinstance(source, FileSource | TraceSource):
        path = source.path if isinstance(source.path, str) else source.path[0]
        stem = Path(path).name.split(".")[0]
        return re.sub(r"[^\w\-]+", "_", stem) or "data"
    return source.reasoning_gym if isinstance(source, GymSource) else source.task
