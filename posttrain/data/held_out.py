"""Pairs that a preference run is measured on: a share of its own rows, or a file of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from posttrain.config.schema import HeldOutConfig, Recipe
from posttrain.data.sample import Preference
from posttrain.data.sources import preferences
from posttrain.errors import DataError


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """Pairs to train on, and those kept from it.

    Attributes:
        training: rows to train on.
        held_out: rows to measure on.
        shared: how many of the held-out rows have a prompt that is trained on; 0 for a share of the own rows.
    """

    training: list[Preference]
    held_out: list[Preference]
    shared: int

    def summary(self) -> str:
        """One line for people."""
        note = f"; {self.shared:,} of them have a prompt that is trained on" if self.shared else ""
        return f"{len(self.held_out):,} pairs held out, {len(self.training):,} rows left to train on{note}"


def hold_out(config: HeldOutConfig, rows: Sequence[Preference], *, seed: int, offline: bool = False) -> HeldOutRows:
    """Part the rows, or read the held-out ones from their own file.

    All rows of a prompt are on one side. Which prompts are held out follows from the prompts and the seed: the order
    of the rows does not matter.

    Args:
        config: `evaluation.preferences`.
        rows: those of `data.preferences`.
        seed: of the evaluation.

    Raises:
        DataError: no row is left on one of the sides.
    """
    where = "evaluation.preferences"
    if config.data is not None:
        held_out, training = preferences(config.data, f"{where}.data", offline=offline), list(rows)
    else:
        assert config.share is not None  # without `data` there is one
        prompts = sorted({prompt_content(row) for row in rows}, key=lambda prompt: _rank(prompt, seed))
        chosen = set(prompts[: ceil(config.share * len(prompts))])
        held_out = [row for row in rows if prompt_content(row) in chosen]
        training = [row for row in rows if prompt_content(row) not in chosen]
    if not held_out or not training:
        raise DataError(
            f"{len(held_out)} pairs to measure on and {len(training)} to train on",
            where=where,
            hint="lower `share`, or give more pairs",
        )
    trained = {prompt_content(row) for row in training}
    held_out = held_out[: config.limit]
    return HeldOutRows(training, held_out, sum(prompt_content(row) in trained for row in held_out))


def held_out_rows(recipe: Recipe, rows: Sequence[Any], *, offline: bool = False) -> HeldOutRows | None:
    """The rows with those apart that `evaluation.preferences` holds out; None without that section.

    Raises:
        DataError: as `hold_out`.
    """
    evaluation = recipe.evaluation
    if evaluation is None or evaluation.preferences is None:
        return None
    return hold_out(evaluation.preferences, rows, seed=evaluation.seed, offline=offline)


def prompt_content(row: Preference) -> str:
    """What makes two prompts the same."""
    return json.dumps([row.problem.prompt, row.problem.chat], sort_keys=True)


def _rank(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()
