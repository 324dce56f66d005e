"""The metric registry: every number a run may log, with meaning, unit, reducer, healthy range and what to do.

`docs/metrics.md` is made from it: `python -m posttrain.tracking.metrics > docs/metrics.md`. To add a metric: one entry
beside what logs it (`SECTIONS`), or in `metrics` of the method that alone does, then that command. A name may be a
family: `eval/<benchmark>/greedy` covers that name for every benchmark.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import isinf, isnan
from typing import SupportsFloat

from posttrain.config.metric import Metric
from posttrain.environments.metrics import EPISODES
from posttrain.errors import PluginError, PosttrainError, nearest
from posttrain.methods import METHODS
from posttrain.methods.metrics import DISTILLATION, EXPERT_ROWS, PREFERENCES, TERMS
from posttrain.terminal import say
from posttrain.tracking.ledger import TIME
from posttrain.tracking.of_evaluations import EVALUATION, HELD_OUT
from posttrain.tracking.of_shells import (
    COMPLETIONS,
    CRITICS,
    DISTANCES,
    EXPERTS,
    OPTIMISATION,
    REFILLED,
    SOURCES,
)
from posttrain.verifiers.metrics import VERDICTS
from posttrain.verifiers.verdict import Status

_log = logging.getLogger(__name__)

PLACEHOLDERS = {
    "k": r"\d+",
    "status": "|".join(Status),
    "benchmark": ".+",
    "verifier": "[^/]+",
    "term": "[^/]+",
    "source": "[^/]+",
    "stop": "done|turn_limit|token_limit|cut|gave_up|crash|timeout|diverged",
    "kind": "policy|prefix|reset|guided",
}
"""What a placeholder in a family's name stands for, as a regular expression."""


class MetricError(PosttrainError, KeyError):
    """A metric name that is not in the registry."""


SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Optimisation": OPTIMISATION,
    "Sources of a mixture": SOURCES,
    "Reward and verdicts": VERDICTS,
    "Completions": COMPLETIONS,
    "Episodes": EPISODES,
    "Experts": EXPERTS,
    "Distance between policies": DISTANCES,
    "Preferences": PREFERENCES,
    "Critics and offline RL": CRITICS,
    "Refilled rollouts": REFILLED,
    "Distillation": DISTILLATION,
    "Terms of an advantage": TERMS,
    "Optimal advantages": METHODS["a_star_po"].metrics,
    "Expert rows": EXPERT_ROWS,
    "Evaluation": EVALUATION,
    "Held-out pairs": HELD_OUT,
    "Time and compute": TIME,
}
"""Title to what is declared beside whatever logs it; of shells and evaluations, which stand above, in this package."""

METRICS: dict[str, Metric] = {metric.name: metric for section in SECTIONS.values() for metric in section}

SECTIONS["Single methods"] = tuple(
    m for method in METHODS.values() for m in vars(method).get("metrics", ()) if m.name not in METRICS
)
METRICS |= {metric.name: metric for metric in SECTIONS["Single methods"]}


def _pattern(family: str) -> re.Pattern[str]:
    """The regular expression of a family's name."""
    parts = re.split(r"<(\w+)>", family)
    return re.compile(
        "".join(f"(?:{PLACEHOLDERS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    )


# The longest first: `eval/<benchmark>/greedy_low` must not be taken for a benchmark's `greedy`.
_FAMILIES = [(_pattern(name), METRICS[name]) for name in sorted(METRICS, key=len, reverse=True) if "<" in name]


def register(metric: Metric) -> Metric:
    """Make a metric of a plugin known, with what it means and its healthy range.

    Raises:
        PluginError: the name is taken.
    """
    if metric.name in METRICS:
        raise PluginError(f"there is a metric {metric.name!r} already", hint="give yours another name")
    METRICS[metric.name] = metric
    if "<" in metric.name:
        _FAMILIES.append((_pattern(metric.name), metric))
        _FAMILIES.sort(key=lambda family: len(family[1].name), reverse=True)
    require.cache_clear()
    return metric


def declare(metrics: Iterable[Metric]) -> None:
    """Make the metrics known that a method's class declares, those of a plugin's too.

    Raises:
        PluginError: a name is taken by another metric.
    """
    for metric in metrics:
        if METRICS.get(metric.name) != metric:
            register(metric)


def declared(name: str) -> Metric:
    """As `require`, for what is logged: a run does not end for a name that nobody has declared, a mean is taken."""
    try:
        return require(name)
    except MetricError as error:
        _log.warning("%s: logged as a mean without a healthy range (docs/plugins.md: how to declare it)", error.what)
        return register(Metric(name, "Not declared by the method that logs it.", "1"))


@lru_cache(maxsize=4096)
def require(name: str) -> Metric:
    """The registry entry of a metric name, or of the family it belongs to.

    Raises:
        MetricError: the name is not registered.
    """
    if name in METRICS and "<" not in name:
        return METRICS[name]
    for pattern, metric in _FAMILIES:
        if pattern.fullmatch(name):
            return metric
    family = [known for known in METRICS if "/" in name and known.split("/")[0] == name.split("/")[0]]
    raise MetricError(f"unregistered metric {name!r}", hint=nearest(name, family or METRICS))


Add = Callable[[str, float, float], None]
"""Takes name, sum and count: `Means.add`."""


class Means:
    """Collects (sum, count) pairs of metrics over micro-steps and ranks, and reduces each as the registry says.

    A `weighted_mean` is the sum of sums over the sum of counts, so that uneven micro-batches and ranks weigh what they
    hold. For `sum`, `max` and `last` the value itself takes the place of the sum.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: SupportsFloat, count: SupportsFloat = 1) -> None:
        """Add the sum of `count` values. With a count of 0 it adds nothing.

        Raises:
            ValueError: the count is negative.
        """
        reducer, total, count = declared(name).reducer, float(total), float(count)
        if count < 0:
            raise ValueError(f"{name}: count {count}")
        if count == 0:
            return
        if name in self._pairs:
            before, n = self._pairs[name]
            count += n
            if reducer in ("weighted_mean", "sum"):
                total += before
            elif reducer == "max" and not (total > before or isnan(total)):
                total = before
        self._pairs[name] = (total, count)

    def merge(self, other: Means | Mapping[str, tuple[float, float] | list[float]]) -> None:
        """Add everything that another accumulator (or its `state_dict`) holds."""
        pairs = other._pairs if isinstance(other, Means) else other
        for name, (total, count) in pairs.items():
            self.add(name, total, count)

    def result(self) -> dict[str, float]:
        """One value per metric that has data, sorted by name."""
        mean = {name for name in self._pairs if require(name).reducer == "weighted_mean"}
        return {name: total / n if name in mean else total for name, (total, n) in sorted(self._pairs.items())}

    def state_dict(self) -> dict[str, list[float]]:
        """Name -> [sum, count]; JSON values."""
        return {name: list(pair) for name, pair in self._pairs.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, float] | list[float]]) -> None:
        self._pairs = {}
        self.merge(state)


def healthy_range(metric: Metric) -> str:
    """The range for people: `0 to 0.25`, `at least 1.5`, or nothing."""
    if metric.healthy is None:
        return ""
    low, high = metric.healthy
    if isinf(high):
        return f"at least {low:g}"
    return f"at most {high:g}" if isinf(low) else f"{low:g} to {high:g}"


def metrics_table() -> str:
    """The page `docs/metrics.md`: a table per section, and what to do about each alarm."""
    lines = [
        "# Metrics",
        "",
        "<!-- Made by `python -m posttrain.tracking.metrics > docs/metrics.md`; edit the registry instead. -->",
        "",
        "Every number that a run writes to `metrics.jsonl`. Names with `<...>` are families. A value outside its",
        "healthy range raises an alarm once it has been there for as many entries in a row as its patience. The alarm",
        "comes once, and again only after the value has been back inside for as long. A NaN or infinite value raises",
        "one at once.",
    ]
    for title, section in SECTIONS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| metric | meaning | unit | reducer | healthy | patience |",
            "|" + " --- |" * 6,
        ]
        for m in section:
            patience = str(m.patience) if m.healthy else ""
            cells = (f"`{m.name}`", m.meaning, m.unit, m.reducer.replace("_", " "), healthy_range(m), patience)
            lines.append("| " + " | ".join(cells) + " |")
        if alarmed := [m for m in section if m.alarm]:
            lines += ["", "When the alarm comes:", "", *(f"- `{m.name}`: {m.alarm}" for m in alarmed)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import argparse

    argparse.ArgumentParser(description=__doc__).parse_args()
    say(metrics_table(), nl=False)
