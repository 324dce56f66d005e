"""The arms of a study, from its JSON: scores by seed, differences that are paired by seed, and curves over compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.statistics import Interval, difference_interval, mean_interval
from posttrain.tracking.ledger import TOKENS, UNITS

Json = Mapping[str, Any]

_PLACES = 60
"""Amounts of compute at which the curves of an arm's seeds are read, between their points."""


def scores(arm: Json) -> dict[int, float]:
    """Seed -> score of the reported cells that did not fail."""
    return {cell["seed"]: cell["score"] for cell in arm["cells"] if not cell["error"]}


def baseline(study: Json) -> str:
    """The arm that the others are paired with: the one asked for, or the best mean."""
    measured = {arm["name"]: fmean(scores(arm).values()) for arm in study["arms"] if scores(arm)}
    asked = study["config"].get("baseline")
    return asked if asked in measured else max(measured, key=lambda name: measured[name])


def mean(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean over seeds, with its 95% t interval from two seeds on."""
    return fmean(values), mean_interval(values, method="t") if len(values) > 1 else None


def paired(base: Json, other: Json) -> tuple[float, Interval | None, int] | None:
    """Score of the other arm minus that of the base over the seeds that both have: mean, 95% interval from two seeds
    on, and number of the seeds; None if they share none."""
    ours, theirs = scores(base), scores(other)
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    pairs = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    return (
        fmean(pairs[1]) - fmean(pairs[0]),
        difference_interval(*pairs, method="t") if len(seeds) > 1 else None,
        len(seeds),
    )


def curves(arm: Json) -> list[list[dict[str, float]]]:
    """Those of the reported cells that have more than one point; a point has its score and what was spent by then."""
    return [cell["curve"] for cell in arm["cells"] if not cell["error"] and len(cell["curve"]) > 1]


def units_of(found: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    """Units of compute that all points of the curves have, and in which something was spent."""
    points = [point for curve in found for point in curve]
    return [unit for unit in UNITS if all(unit in point for point in points) and any(point[unit] for point in points)]


def band(
    found: Sequence[Sequence[Mapping[str, float]]], unit: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Amounts that all seeds have spent, and mean, lower and upper end of the score there, over the seeds.

    Where all seeds have the same score the band has no width: the start is one model, whatever the seed.

    Args:
        found: one curve per seed, as `curves` gives them; at least one.
        unit: one of `units_of`.
    """
    first = max(curve[0][unit] for curve in found)
    last = min(curve[-1][unit] for curve in found)
    amounts = np.linspace(first, max(first, last), _PLACES)
    read = np.array(
        [np.interp(amounts, [p[unit] for p in curve], [p["score"] for p in curve]) for curve in found]
    )  # (seeds, amounts)
    ends = np.repeat(read.mean(axis=0, keepdims=True), 3, axis=0)  # mean, low, high
    for place, column in enumerate(read.T):
        if np.ptp(column) > 0:
            interval = mean_interval(column, method="t")
            ends[1:, place] = interval.low, interval.high
    return amounts, ends[0], ends[1], ends[2]


def unit_of(spent: Mapping[str, float], unit: str) -> float:
    """What was spent in the unit of a budget: tokens are those of all passes, seconds those of GPUs, else the CPU."""
    if unit == "tokens":
        return sum(spent.get(f"tokens_{kind}", 0.0) for kind in TOKENS)
    if unit == "seconds":
        return spent.get("gpu_seconds") or spent.get("cpu_seconds", 0.0)
    return spent.get(unit, 0.0)
