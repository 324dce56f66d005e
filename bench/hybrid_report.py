"""What the cells of `hybrid.py` say: a table, the map of winners, PrefixRL's claim, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from posttrain.evaluation.statistics import difference_interval, mean_interval

MEASURE, KNOWN, OURS = "avg@4", "known_avg@4", ("prefixrl", "prefixrl_both")
"""What is reported first, the same on the problems that the traces solve, and the arms whose claim is tested; the
others are the baselines."""
TITLES = {"": "fresh problems", "known_": "the problems that the traces solve"}
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974")
Cell = dict[str, Any]
Cells = dict[tuple[str, str], list[Cell]]


def report(folder: Path, regimes: Sequence[str], arms: Sequence[str]) -> str:
    """Text for people; draws `hybrid.png` beside the cells."""
    cells = read_cells(folder, regimes, arms)
    if not cells:
        return f"no finished cell in {folder}"
    draw(cells, folder / "hybrid.png")
    tables = [table(cells, measure) for measure in ("greedy", MEASURE, KNOWN)]
    parts = [*tables, winners(cells), claim(cells, MEASURE), claim(cells, KNOWN), costs(cells)]
    return "\n\n".join(part for part in parts if part)


def read_cells(folder: Path, regimes: Sequence[str], arms: Sequence[str]) -> Cells:
    """The finished cells by (regime, arm), in the order of their seeds."""
    cells: Cells = {}
    for regime in regimes:
        for arm in arms:
            paths = (folder / regime / arm).glob("seed-*.json")
            found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            if found:
                cells[regime, arm] = sorted(found, key=lambda cell: cell["seed"])
    return cells


def names(cells: Cells, part: int) -> list[str]:
    return list(dict.fromkeys(key[part] for key in cells))


def finals(cells: Sequence[Cell], measure: str) -> NDArray[np.float64]:
    return np.array([cell["points"][-1][measure] for cell in having(cells, measure)])


def having(cells: Sequence[Cell], measure: str) -> list[Cell]:
    """Those with the measure: without a solved problem there is nothing known to measure."""
    return [cell for cell in cells if measure in cell["points"][0]]


def where(measure: str) -> str:
    """On which problems a measure was taken, in words."""
    return TITLES["known_" if measure.startswith("known_") else ""]


def percent(values: NDArray[np.float64]) -> str:
    """Mean over seeds in percent, with the 95% t interval from two seeds on."""
    if len(values) == 0:
        return "-"
    if len(values) < 2:
        return f"{100 * values[0]:.1f} (1 seed)"
    found = mean_interval(values, method="t")
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(cells: Cells, measure: str) -> str:
    """Final accuracy without prefix; the base in the first row."""
    regimes = names(cells, 0)
    heads = [f"{regime} ({pass_rate(cells, regime):.2%})" for regime in regimes]
    title = f"final {measure.removeprefix('known_')} on {where(measure)}, percent, by regime (base pass@1)"
    lines = [title, "| arm | " + " | ".join(heads) + " |"]
    lines.append("| --- " * (len(heads) + 1) + "|")
    of = [having(of_regime(cells, regime), measure) for regime in regimes]
    bases = [{cell["seed"]: cell["points"][0][measure] for cell in found} for found in of]
    lines.append("| base | " + " | ".join(percent(np.array(list(base.values()))) for base in bases) + " |")
    for arm in names(cells, 1):
        row = [percent(finals(cells[regime, arm], measure)) if (regime, arm) in cells else "-" for regime in regimes]
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def of_regime(cells: Cells, regime: str) -> list[Cell]:
    return [cell for (name, _), found in cells.items() if name == regime for cell in found]


def pass_rate(cells: Cells, regime: str) -> float:
    """Mean over seeds of the base's pass@1 on the pool."""
    return float(np.mean(list({cell["seed"]: cell["base_pass"] for cell in of_regime(cells, regime)}.values())))


def winners(cells: Cells) -> str:
    """For each regime the best mean, and the arms whose paired difference to it has an interval that holds 0."""
    lines = ["which arm wins (avg@4, mean over seeds; paired by seed)"]
    for regime in names(cells, 0):
        arms = {
            arm: {c["seed"]: c["points"][-1][MEASURE] for c in found}
            for (r, arm), found in cells.items()
            if r == regime
        }
        best = max(arms, key=lambda arm: float(np.mean(list(arms[arm].values()))))
        level = [arm for arm in arms if arm != best and not_apart(arms[arm], arms[best])]
        tail = f"; not told apart from it: {', '.join(level)}" if level else ""
        tail = "; one seed tells nothing apart" if len(arms[best]) < 2 else tail
        lines.append(f"- base pass@1 {pass_rate(cells, regime):.2%} ({regime}): {best}{tail}")
    return "\n".join(lines)


def not_apart(one: dict[int, float], other: dict[int, float]) -> bool:
    """Whether the difference over the seeds that both have may be 0; always so with fewer than two."""
    seeds = sorted(set(one) & set(other))
    if len(seeds) < 2:
        return True
    found = difference_interval([one[s] for s in seeds], [other[s] for s in seeds])
    return found.low <= 0 <= found.high


def claim(cells: Cells, measure: str) -> str:
    """Where PrefixRL's mean curve, sampling included, reaches the final accuracy of the best other arm."""
    lines = [f"PrefixRL's claim (the strongest baseline's result for half the compute) on {where(measure)}"]
    for regime in names(cells, 0):
        had = {arm: having(found, measure) for (name, arm), found in cells.items() if name == regime}
        ends = {arm: finals(found, measure).mean() for arm, found in had.items() if found}
        others = {arm: end for arm, end in ends.items() if arm not in OURS}
        if not others:
            continue
        best = max(others, key=lambda arm: others[arm])
        for arm in (arm for arm in OURS if arm in ends):
            found = had[arm]
            grid = np.linspace(0, max(cell["budget"] for cell in found), 400)
            reached = grid[mean_curve(found, grid, measure) >= others[best]]
            place = f"- {regime}: {best} ends at {100 * others[best]:.1f}; {arm}"
            if len(reached) == 0:
                lines.append(f"{place} does not reach it, {100 * ends[arm]:.1f}")
            else:
                lines.append(f"{place} is there after {reached[0] / grid[-1]:.2f} of the budget")
    return "\n".join(lines) if len(lines) > 1 else ""


def mean_curve(cells: Sequence[Cell], grid: NDArray[np.float64], measure: str) -> NDArray[np.float64]:
    """Mean over seeds of the curves between their points; the base's accuracy before, the last value after."""
    curves = []
    for cell in cells:
        flops = [point["flops"] for point in cell["points"]]
        curves.append(np.interp(grid, flops, [point[measure] for point in cell["points"]]))
    return np.mean(curves, axis=0)


def costs(cells: Cells) -> str:
    """Compute that was used and what of it bought traces, and CPU seconds."""
    lines = ["share of the budget used / spent on sampling traces, CPU seconds a cell, seeds"]
    for (regime, arm), found in cells.items():
        used = np.mean([cell["flops"] / cell["budget"] for cell in found])
        bought = np.mean([cell["sampling"] / cell["budget"] for cell in found])
        seconds = np.mean([cell["seconds"] for cell in found])
        note = "" if all(cell["trained"] for cell in found) else ", some without a trace and so untrained"
        lines.append(f"- {regime} {arm}: {used:.2f} / {bought:.2f}, {seconds:.0f} s, {len(found)}{note}")
    return "\n".join(lines)


def draw(cells: Cells, path: Path) -> None:
    """Accuracy against compute, one panel for each regime, and final accuracy against the base's pass rate."""
    regimes, arms = names(cells, 0), names(cells, 1)
    figure = Figure(figsize=(4.2 * (len(regimes) + 1), 3.9), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(regimes) + 1, squeeze=False)[0]
    for ax, regime in zip(axes, regimes, strict=False):
        for number, arm in enumerate(arms):
            if (regime, arm) not in cells:
                continue
            found, colour = cells[regime, arm], COLOURS[number % len(COLOURS)]
            start = max(cell["points"][0]["flops"] for cell in found)
            grid = np.linspace(start, max(cell["flops"] for cell in found), 200)
            ax.plot(grid / 1e12, 100 * mean_curve(found, grid, MEASURE), color=colour, label=arm)
            for cell in found:
                xs, ys = zip(*[(point["flops"], point[MEASURE]) for point in cell["points"]], strict=True)
                ax.plot(np.array(xs) / 1e12, 100 * np.array(ys), color=colour, alpha=0.2, linewidth=0.8)
        ax.set_title(f"{regime}: base pass@1 {pass_rate(cells, regime):.2%}", fontsize=10, loc="left")
        ax.set_xlabel("TFLOPs, traces included", fontsize=8)
        ax.set_ylabel(f"{MEASURE} without prefix, percent", fontsize=8)
        ax.grid(color="#dddddd", linewidth=0.6)
    axes[0].legend(fontsize=7.5, frameon=False)
    for number, arm in enumerate(arms):
        found = [(pass_rate(cells, r), finals(cells[r, arm], MEASURE).mean()) for r in regimes if (r, arm) in cells]
        xs, ys = zip(*sorted(found), strict=True)
        axes[-1].plot(100 * np.array(xs), 100 * np.array(ys), "o-", color=COLOURS[number % len(COLOURS)], label=arm)
    axes[-1].set_xscale("log")
    rates = [100 * pass_rate(cells, regime) for regime in regimes]
    axes[-1].set_xticks(rates, [f"{rate:.2g}" for rate in rates])
    axes[-1].minorticks_off()
    axes[-1].set_title("which arm wins where", fontsize=10, loc="left")
    axes[-1].set_xlabel("base pass@1, percent", fontsize=8)
    axes[-1].set_ylabel(f"final {MEASURE}, percent", fontsize=8)
    axes[-1].grid(color="#dddddd", linewidth=0.6)
    figure.savefig(path, format="png")
