"""Reading several scored responses of a row, and pairing them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Message, Preference, Sample
from posttrain.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """One response of a row with its score."""

    role: str
    text: str | tuple[Message, ...]
    score: float


def texts(row: Preference) -> dict[str, str | tuple[Message, ...]]:
    """All responses of a row by role: chosen, rejected, then the others."""
    return {"chosen": row.chosen, "rejected": row.rejected, **row.others}


def scored_responses(row: Preference) -> list[ScoredResponse]:
    """All responses of a row with their scores, in the order of `texts`.

    Raises:
        DataError: a response has no score.
    """
    found = texts(row)
    missing = [role for role in found if role not in row.scores]
    if missing:
        raise DataError(
            f"no score of {', '.join(missing)}",
            where=row.problem.where,
            hint="name the columns: data.preferences.scores: {" + f"{missing[0]}: <column>" + "}",
        )
    return [ScoredResponse(role, text, row.scores[role]) for role, text in found.items()]


def number_of(row: Preference, column: str) -> float:
    """The number in a column of the row that is neither prompt nor response nor score.

    Raises:
        DataError: no such column, or no finite number in it.
    """
    meta = row.problem.meta
    if column not in meta:
        raise DataError(f"no column {column!r}", where=row.problem.where, hint=nearest(column, map(str, meta)))
    found = meta[column]
    # CSV files hold numbers as text.
    try:
        value = float(found) if isinstance(found, str | int | float) and not isinstance(found, bool) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"must be a finite number, got {found!r}", where=f"{row.problem.where}, column {column!r}")
    return value


def derived(row: Preference, part: str, **changes: Any) -> Preference:
    """One of several rows made of `row`, with a problem id of its own; see `source_id`."""
    return replace(row, problem=replace(row.problem, id=f"{row.problem.id}#{part}"), others={}, **changes)


def source_id(row: Preference) -> str:
    """The problem id of the row that a derived row was made of."""
    return row.problem.id.rpartition("#")[0]


def numbered_roles(n: int) -> list[str]:
    """Roles of n responses of equal standing."""
    return [f"response_{index}" for index in range(n)]


def numbered_responses(row: Preference, n: int) -> list[ScoredResponse]:
    """The n scored responses of a row, as `numbered_roles` counts them.

    Raises:
        DataError: another number of responses, or one without a score.
    """
    found = scored_responses(row)
    if len(found) != n:
        raise DataError(
            f"{len(found)} responses (chosen, rejected and {len(row.others)} others), the method compares {n}",
            where=row.problem.where,
            hint="name all columns in data.preferences.others, or set the method's number of responses",
        )
    return found


def numbered_samples(row: Preference, n: int, renderer: Renderer) -> dict[str, Sample]:
    """Role -> tokens of the n scored responses of a row. Errors as for `numbered_responses`."""
    found = zip(numbered_roles(n), numbered_responses(row, n), strict=True)
    return {role: renderer.sample(Example(row.problem, one.text)) for role, one in found}


def ranked_pairs(scores: Sequence[float], pairs: Literal["best", "all"]) -> list[tuple[int, int]]:
    """(better, worse) indices by falling gap of their scores; equal gaps in the order of rank, equal scores left out.

    Args:
        pairs: `best` pairs the best response (the first one of several) with each other one, `all` every two.
    """
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    found = [pair for pair in combinations(ranked, 2) if pairs == "all" or pair[0] == ranked[0]]
    found = [(i, j) for i, j in found if scores[i] > scores[j]]
    return sorted(found, key=lambda pair: scores[pair[1]] - scores[pair[0]])
