"""Alarms: values that left their healthy range for too long, and values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.tracking.metrics import Metric, require

Condition = Literal["low", "high", "nonfinite"]

NONFINITE = (
    "The value is NaN or infinite; weights may be ruined from here on. Go back to the last checkpoint, lower the "
    "learning rate, check `max_grad_norm`, and use bfloat16 or float32 rather than float16."
)


@dataclass(frozen=True, slots=True)
class Alarm:
    """A metric that has left its healthy range.

    Attributes:
        name: metric and condition, e.g. `entropy low`.
        metric: name of the metric.
        step: optimizer step at which it was raised.
        value: the value of that step.
        text: what was seen, what it means and what to do.
    """

    name: str
    metric: str
    step: int
    value: float
    text: str


def alarms(step: int, metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> list[Alarm]:
    """The alarms that the values of this step raise, in the order of `metrics`.

    An alarm is raised once per condition; it can be raised again after the condition has cleared.

    Args:
        step: optimizer step.
        metrics: its values; NaN and infinities as they are.
        history: values of earlier entries, oldest first, without this one. Enough of it to hold a few times the largest
            patience will do.

    Raises:
        MetricError: a name is not registered.
    """
    raised = []
    for name in metrics:
        metric = require(name)
        values = [float(entry[name]) for entry in (*history, metrics) if name in entry]
        for condition in _raised_by_last(metric, values):
            raised.append(
                Alarm(f"{name} {condition}", name, step, values[-1], _text(name, metric, condition, values[-1]))
            )
    return raised


def _raised_by_last(metric: Metric, values: Sequence[float]) -> list[Condition]:
    """Conditions that the last of `values` raises."""
    found: list[Condition] = []
    if _rises([not math.isfinite(value) for value in values], 1):
        found.append("nonfinite")
    if metric.healthy is not None and math.isfinite(values[-1]):
        low, high = metric.healthy
        finite = [value for value in values if math.isfinite(value)]
        if _rises((value < low for value in finite), metric.patience):
            found.append("low")
        if metric.rises:
            finite = finite[next((place for place, value in enumerate(finite) if value <= high), len(finite)) :]
        if _rises((value > high for value in finite), metric.patience):
            found.append("high")
    return found


def _rises(outside: Iterable[bool], patience: int) -> bool:
    """Whether the last entry is the one that switches the alarm on: the same `patience` switches it on and off."""
    on = rises = False
    run, before = 0, None
    for is_outside in outside:
        run = run + 1 if is_outside == before else 1
        before = is_outside
        rises = run >= patience and is_outside and not on
        if run >= patience:
            on = is_outside
    return rises


def _text(name: str, metric: Metric, condition: Condition, value: float) -> str:
    if condition == "nonfinite" or metric.healthy is None:
        return f"{name} is {value}. {NONFINITE}"
    limit = metric.healthy[0] if condition == "low" else metric.healthy[1]
    side = "below" if condition == "low" else "above"
    times = f" for {metric.patience} entries" if metric.patience > 1 else ""
    return f"{name} {value:.3g} is {side} {limit:g}{times}. {metric.alarm}"
