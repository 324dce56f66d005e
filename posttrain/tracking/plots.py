"""Curves of a run as PNG, from its `metrics.jsonl`. `heat_strip` draws tokens and `study.plot` studies; no
other module imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from posttrain.errors import DataError, nearest
from posttrain.safe_files import file_atomic
from posttrain.tracking.events import FILE_NAME, Event, metrics_of, read_events, series
from posttrain.tracking.metrics import require
from posttrain.tracking.panels import LOG_FROM, Panel, evaluation_metrics, panels_of

COLOURS = ("#33628f", "#c8702a", "#4f8f5b", "#9a4f6f", "#7a7a7a", "#8a7a2e", "#5a56a0", "#3d9a9a")
GREY, PALE = "#555555", "#dddddd"


def plot_run(run_dir: Path) -> list[Path]:
    """Draw `plots/curves.png`: a panel for each kind of metric that the run logged.

    Returns:
        The files written.

    Raises:
        DataError: the folder has no metrics, or a damaged file.
    """
    run_dir = Path(run_dir)
    events = read_events(run_dir / FILE_NAME)
    logged = {name for event in events for name in metrics_of(event)}
    panels, evaluations = panels_of(logged), evaluation_metrics(logged)
    if not panels:
        raise DataError("nothing to draw: none of the metrics has a panel", where=str(run_dir / FILE_NAME))
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * rows + 0.4), dpi=130, layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    note = "   (red dotted lines: alarms)" if any("alarm" in event for event in events) else ""
    figure.suptitle(run_dir.resolve().name + note, fontsize=11, color=GREY)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    last = max(event["step"] for event in events)
    for panel, ax in zip(panels, axes, strict=False):
        _draw(ax, panel, events, evaluations if panel.evaluations else [])
        ax.set_xlim(-0.02 * last, 1.02 * last if last else 1.0)
    for ax in axes[len(panels) :]:
        ax.remove()
    return [_save(figure, run_dir / "plots" / "curves.png")]


def plot_comparison(run_dirs: Sequence[Path], metric: str, out: Path) -> Path:
    """Draw one metric of several runs (seeds, methods) into one figure: moving averages over the pale raw curves.

    Args:
        run_dirs: folders of the runs; the legend shows their names.
        metric: a registered name that each run has logged.
        out: the PNG file.

    Raises:
        DataError: no run is given, a run has no metrics, or not this one.
        MetricError: the name is not registered.
    """
    entry = require(metric)
    if not run_dirs:
        raise DataError("no run to draw", hint="give at least one output folder")
    figure = Figure(figsize=(8.0, 4.5), dpi=130, layout="constrained")
    ax = figure.subplots()
    for number, (label, run_dir) in enumerate(zip(_labels(run_dirs), run_dirs, strict=True)):
        path = Path(run_dir) / FILE_NAME
        events = read_events(path)
        steps, values = series(events, metric)
        if not steps:
            logged = {name for event in events for name in metrics_of(event)}
            raise DataError(f"the run has no metric {metric!r}", where=str(path), hint=nearest(metric, logged))
        colour = COLOURS[number % len(COLOURS)]
        if metric.startswith("eval/"):
            # A little apart, so that the intervals of different runs do not hide each other.
            _draw_evaluation(ax, events, metric, label, colour, "o", shift=number * 0.006 * steps[-1])
        else:
            _draw_curve(ax, steps, values, label, colour, style="-" if number < len(COLOURS) else "--")
    _decorate(ax, metric, entry.unit)
    _legend(ax, outside=len(run_dirs) > 4)
    return _save(figure, Path(out))


def draw_lengths(lengths: Mapping[str, Sequence[int]], unit: str, out: Path) -> Path:
    """Histograms of the lengths of rows, one panel per source.

    Args:
        lengths: source -> one number per row.
        unit: of the numbers.
        out: PNG file.
    """
    figure = Figure(figsize=(7, 2.4 * len(lengths)), layout="constrained")
    for number, (name, found) in enumerate(lengths.items()):
        ax = figure.add_subplot(len(lengths), 1, number + 1)
        ax.hist(found, bins=min(60, max(len(set(found)), 1)), color=COLOURS[0])
        _decorate(ax, f"{name}: {len(found):,} rows", unit)
        ax.set_xlabel(unit)
        ax.set_ylabel("rows")
    return _save(figure, out)


def moving_average(
    values: Sequence[float], window: int, average: Callable[[Sequence[float]], float] = fmean
) -> list[float]:
    """Average of the finite values at most half a window from each position; NaN where there are none.

    Centred, so that a trend is not shifted; at the ends it averages over what there is.
    """
    averages, reach = [], window // 2
    for i in range(len(values)):
        finite = [value for value in values[max(0, i - reach) : i + reach + 1] if math.isfinite(value)]
        averages.append(average(finite) if finite else math.nan)
    return averages


# ------------------------------------------------------------------------------------------------------------ panels


def _draw(ax: Axes, panel: Panel, events: list[Event], evaluations: list[str]) -> None:
    curves = {name: series(events, name) for name in panel.metrics}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    names = {name: name.replace("_", " ") for name in curves}
    if "reward" in curves and curves["reward"] == curves.get("accuracy"):
        del curves["accuracy"]
        names["reward"] = "reward = accuracy"
    positive = sorted(v for _, values in curves.values() for v in values if math.isfinite(v) and v > 0)
    log = panel.log and bool(positive) and positive[-1] > LOG_FROM * median(positive)
    for number, (name, (steps, values)) in enumerate(curves.items()):
        # Where single values tower above the rest, a mean would draw them as plateaus.
        average = (median if log else fmean) if panel.smooth else None
        _draw_curve(ax, steps, values, names[name], COLOURS[number], average=average)
    for number, name in enumerate(evaluations):
        colour, marker = COLOURS[(number + len(curves)) % len(COLOURS)], "osD^v"[number % 5]
        _draw_evaluation(ax, events, name, name.removeprefix("eval/").replace("/", " "), colour, marker)
    if log:
        ax.set_yscale("log")
    if len(curves) > 2:
        ax.margins(y=0.35)  # room for the legend
    if panel.zero and not log:
        ax.set_ylim(bottom=0)
    if positive and positive[-1] < 1e-3 and not log:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    for step in _alarm_steps(events, panel.metrics):
        ax.axvline(step, color="#b03030", linewidth=0.8, linestyle=":", alpha=0.7)
    units = dict.fromkeys(require(name).unit for name in (*curves, *evaluations))
    _decorate(ax, panel.title, ", ".join(unit for unit in units if unit != "1"))
    if len(curves) + len(evaluations) > 1 or "reward" in curves or evaluations:
        _legend(ax, columns=2 if len(curves) > 2 else 1)


def _draw_curve(
    ax: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    label: str,
    colour: str,
    style: str = "-",
    average: Callable[[Sequence[float]], float] | None = fmean,
) -> None:
    """The raw curve, pale, under its moving average; the raw curve alone if it is short or `average` is None."""
    window = round(len(values) / 20)
    if average is None or window < 3:
        marker = "o" if len(values) < 10 else None
        ax.plot(steps, values, style, color=colour, linewidth=1.4, marker=marker, markersize=3, label=label)
        return
    ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    ax.plot(steps, moving_average(values, window, average), style, color=colour, linewidth=1.6, label=label)


def _draw_evaluation(
    ax: Axes, events: list[Event], name: str, label: str, colour: str, marker: str, shift: float = 0.0
) -> None:
    """Points of one evaluation metric, with its interval where that was logged."""
    points = [(event["step"], values) for event in events if name in (values := metrics_of(event))]
    steps = [step + shift for step, _ in points]
    centres = [values[name] for _, values in points]
    below = [max(0.0, v[name] - v.get(f"{name}_low", v[name])) for _, v in points]
    above = [max(0.0, v.get(f"{name}_high", v[name]) - v[name]) for _, v in points]
    ax.errorbar(
        steps,
        centres,
        yerr=[below, above],
        color=colour,
        linewidth=0.9,
        marker=marker,
        markersize=4.5,
        elinewidth=1.0,
        capsize=2.5,
        label=label,
        zorder=3,
    )


def _alarm_steps(events: list[Event], metrics: Sequence[str]) -> list[int]:
    return sorted({event["step"] for event in events if event.get("metric") in metrics})


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """Names of the folders; with their parents' where two are equal."""
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    names = [path.name for path in paths]
    return [path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in paths]


# -------------------------------------------------------------------------------------------------------------- style


def _decorate(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title, fontsize=10, loc="left", color="#222222")
    ax.set_xlabel("step", fontsize=8, color=GREY)
    ax.set_ylabel(unit, fontsize=8, color=GREY)
    ax.tick_params(labelsize=8, colors=GREY, length=3)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.grid(color=PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#aaaaaa")


def _legend(ax: Axes, *, outside: bool = False, columns: int = 1) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if outside else {"loc": "best"}
    ax.legend(ncols=columns, fontsize=7.5, frameon=not outside, framealpha=0.8, edgecolor="none", **place)


def _save(figure: Figure, path: Path) -> Path:
    with file_atomic(path) as beside:
        figure.savefig(beside, format="png")
    return path
