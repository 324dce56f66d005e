from __future__ import annotations

import math

import pytest

from posttrain.tracking.alarms import alarms
from posttrain.tracking.metrics import METRICS

NAN, INF = math.nan, math.inf


def raised_at(name: str, values: list[float | None]) -> list[tuple[int, str]]:
    """Entries and names of the alarms when a run logs these values; None: the entry lacks the metric."""
    history: list[dict[str, float]] = []
    found = []
    for step, value in enumerate(values):
        metrics = {} if value is None else {name: value}
        found += [(step, alarm.name) for alarm in alarms(step, metrics, history)]
        history.append(metrics)
    return found


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("loss", [1.0, 0.5, -0.2], []),
        ("loss", [1.0, NAN, NAN, 1.0, NAN], [(1, "loss nonfinite"), (4, "loss nonfinite")]),
        ("loss", [INF], [(0, "loss nonfinite")]),
        ("grad_norm", [1.0, NAN], [(1, "grad_norm nonfinite")]),
        ("grad_norm", [0.0, 0.0, 0.0, 0.0], [(2, "grad_norm low")]),
        ("grad_norm", [500.0, 1.0, 500.0, 1.0], []),  # single spikes are what clipping is for
        # patience 3; once per condition
        ("entropy", [0.5, 0.001, 0.001], []),
        ("entropy", [0.5, 0.001, 0.001, 0.001, 0.001], [(3, "entropy low")]),
        ("entropy", [0.001, 0.001, 0.001] + [0.5] * 3 + [0.001] * 3, [(2, "entropy low"), (8, "entropy low")]),
        # one value back inside does not clear it, so it does not come again
        ("entropy", [0.001, 0.001, 0.001, 0.5, 0.001, 0.001, 0.001], [(2, "entropy low")]),
        ("entropy", [3.0, 9.0, 9.0, 9.0, 0.0, 0.0, 0.0], [(3, "entropy high"), (6, "entropy low")]),
        ("entropy", [9.0] * 5 + [3.0], []),  # a model from scratch: it has not decayed
        ("entropy", [9.0] * 5 + [3.0, 9.0, 9.0, 9.0], [(8, "entropy high")]),
        ("entropy", [0.01, 0.01, 0.01, 4.0, 4.0, 4.0], []),  # the ends belong to the range
        ("informative_groups", [0.0, 0.0, 0.0, 0.0], []),
        ("informative_groups", [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [(4, "informative_groups low")]),
        ("informative_groups", [0.0, None, 0.0, None, 0.0, 0.0, 0.0], [(6, "informative_groups low")]),
        ("truncated_share", [0.3, 0.3, 0.3], [(2, "truncated_share high")]),
        ("unknown_share", [0.06, 0.0, 0.06, 0.06], [(3, "unknown_share high")]),
        ("kl", [0.9, 1.1, 1.2, 1.3], [(2, "kl high")]),
        ("kl", [2.0, NAN, 2.0, 2.0], [(1, "kl nonfinite"), (2, "kl high")]),
        ("engine_logp_diff_mean", [0.2, 0.2], [(0, "engine_logp_diff_mean high")]),
        ("reward", [0.0, 0.0, 0.0, 0.0], []),
    ],
)
def test_alarms(name: str, values: list[float | None], expected: list[tuple[int, str]]) -> None:
    assert raised_at(name, values) == expected


LIMITS = [
    (name, end)
    for name, metric in METRICS.items()
    if metric.healthy is not None
    for end in ("low", "high")
    if math.isfinite(metric.healthy[end == "high"])
]


@pytest.mark.parametrize(("name", "end"), LIMITS)
def test_every_range_raises_its_alarm_and_no_other(name: str, end: str) -> None:
    """Healthy values raise nothing; the same series that leaves the range for its patience raises that alarm."""
    low, high = METRICS[name].healthy
    inside = low if end == "low" else high
    outside = inside - max(1.0, abs(inside)) if end == "low" else inside + max(1.0, abs(inside))
    logged = name.replace("<benchmark>", "gsm8k").replace("<verifier>", "math").replace("<kind>", "policy")
    patience = METRICS[name].patience
    assert raised_at(logged, [inside] * (patience + 2)) == []
    assert raised_at(logged, [inside] + [outside] * (patience - 1)) == []
    assert raised_at(logged, [inside] + [outside] * (patience + 2)) == [(patience, f"{logged} {end}")]


def test_text_says_what_was_seen_and_what_to_do() -> None:
    history = [{"truncated_share": 0.5}] * 2
    (alarm,) = alarms(7, {"truncated_share": 0.5, "reward": 1.0}, history)
    assert (alarm.step, alarm.metric, alarm.value) == (7, "truncated_share", 0.5)
    assert alarm.text.startswith("truncated_share 0.5 is above 0.25 for 3 entries. ")
    assert METRICS["truncated_share"].alarm in alarm.text
    assert alarms(8, {"truncated_share": 0.5}, [*history, {"truncated_share": 0.5}]) == []


def test_several_at_once_in_the_order_of_the_metrics() -> None:
    found = alarms(0, {"loss": NAN, "engine_logp_diff_mean": 1.0, "grad_norm": INF}, [])
    assert [alarm.name for alarm in found] == ["loss nonfinite", "engine_logp_diff_mean high", "grad_norm nonfinite"]
