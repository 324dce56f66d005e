"""What is said of a number that a run logs, beside whatever logs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reducer = Literal["weighted_mean", "sum", "last", "max"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or one family of them.

    Attributes:
        name: as logged; may hold placeholders of `tracking.metrics.PLACEHOLDERS` in angle brackets.
        meaning: what it says, in one sentence.
        unit: of the value; `1` for pure numbers.
        reducer: how values from micro-steps and ranks become one.
        healthy: inclusive range outside of which an alarm is raised; infinite ends are open; None has no alarm.
        alarm: what leaving the range means and what to do.
        patience: consecutive values outside the range before the alarm, and inside before it counts as cleared.
        rises: values above the range count only after one that was not: what begins there has not risen.
    """

    name: str
    meaning: str
    unit: str
    reducer: Reducer = "weighted_mean"
    healthy: tuple[float, float] | None = None
    alarm: str = ""
    patience: int = 1
    rises: bool = False
