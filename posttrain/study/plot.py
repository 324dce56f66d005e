"""Curves of a study: the score against compute, a line and a band for each arm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from posttrain.evaluation.statistics import mean_interval
from posttrain.safe_files import file_atomic
from posttrain.tracking.plots import COLOURS, GREY, PALE

_PLACES = 60
"""Amounts of compute at which the curves of an arm's seeds are read, between their points."""


def draw(study: Mapping[str, Any], path: Path) -> bool:
    """Draw the curves of all arms that have some.

    Args:
        study: its JSON.
        path: the PNG file; nothing is written where no arm has a curve.

    Returns:
        Whether it was written.
    """
    budget = study["config"].get("budget") or {}
    unit = next((name for name in ("tokens", "seconds") if budget.get(name) is not None), "flops")
    figure = Figure(figsize=(8.0, 4.5), dpi=130, layout="constrained")
    ax = figure.subplots()
    drawn = 0
    for number, arm in enumerate(study["arms"]):
        curves = [cell["curve"] for cell in arm["cells"] if not cell["error"] and len(cell["curve"]) > 1]
        if not curves:
            continue
        amounts, mean, low, high = band(curves, unit)
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(amounts, 100 * mean, color=colour, label=arm["name"])
        if len(curves) > 1:
            ax.fill_between(amounts, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
        drawn += 1
    if not drawn:
        return False
    ax.set_xlabel({"flops": "FLOPs", "tokens": "tokens", "seconds": "seconds"}[unit], color=GREY)
    ax.set_ylabel(f"{study['plan']['measure']}, percent", color=GREY)
    ax.set_title(f"{study['study']}: mean over seeds, band: 95% interval", fontsize=10, loc="left", color=GREY)
    ax.grid(color=PALE, linewidth=0.6)
    ax.legend(fontsize=8, frameon=False)
    with file_atomic(path) as beside:
        figure.savefig(beside, format="png")
    return True


def band(
    curves: list[list[dict[str, float]]], unit: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Amounts that all seeds have spent, and mean, lower and upper end of the score there, over the seeds."""
    first = max(curve[0][unit] for curve in curves)
    last = min(curve[-1][unit] for curve in curves)
    amounts = np.linspace(first, max(first, last), _PLACES)
    read = np.array(
        [np.interp(amounts, [p[unit] for p in curve], [p["score"] for p in curve]) for curve in curves]
    )  # (seeds, amounts)
    if len(curves) < 2:
        return amounts, read[0], read[0], read[0]
    found = [mean_interval(column, method="t") for column in read.T]
    ends = np.array([[each.value, each.low, each.high] for each in found])
    return amounts, ends[:, 0], ends[:, 1], ends[:, 2]
