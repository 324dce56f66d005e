"""Curves of a study: the score against compute, a line and a band for each arm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from posttrain.evaluation.arms import band, curves
from posttrain.safe_files import file_atomic
from posttrain.tracking.ledger import UNITS
from posttrain.tracking.plots import COLOURS, GREY, PALE


def draw(study: Mapping[str, Any], path: Path) -> bool:
    """Draw the curves of all arms that have some.

    Args:
        study: its JSON.
        path: the PNG file; nothing is written where no arm has a curve.

    Returns:
        Whether it was written.
    """
    budget = study["config"].get("budget") or {}
    unit = next((name for name in UNITS if budget.get(name) is not None), UNITS[0])
    figure = Figure(figsize=(8.0, 4.5), dpi=130, layout="constrained")
    ax = figure.subplots()
    drawn = 0
    for number, arm in enumerate(study["arms"]):
        found = curves(arm)
        if not found:
            continue
        amounts, mean, low, high = band(found, unit)
        colour = COLOURS[number % len(COLOURS)]
        ax.plot(amounts, 100 * mean, color=colour, label=arm["name"])
        if len(found) > 1:
            ax.fill_between(amounts, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
        drawn += 1
    if not drawn:
        return False
    ax.set_xlabel("FLOPs" if unit == "flops" else unit.replace("_", " "), color=GREY)
    ax.set_ylabel(f"{study['plan']['measure']}, percent", color=GREY)
    ax.set_title(f"{study['study']}: mean over seeds, band: 95% interval", fontsize=10, loc="left", color=GREY)
    ax.grid(color=PALE, linewidth=0.6)
    ax.legend(fontsize=8, frameon=False)
    with file_atomic(path) as beside:
        figure.savefig(beside, format="png")
    return True
