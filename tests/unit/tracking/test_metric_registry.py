from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import PosttrainError
from posttrain.tracking.console import COLUMNS
from posttrain.tracking.metrics import METRICS, PLACEHOLDERS, SECTIONS, Means, MetricError, metrics_table, require
from posttrain.tracking.panels import PANELS
from posttrain.verifiers.verdict import Status

ROOT = Path(__file__).parents[3]


def test_every_metric_is_complete() -> None:
    assert len(METRICS) == sum(len(section) for section in SECTIONS.values()), "a name is registered twice"
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.meaning.endswith(".") and "|" not in metric.meaning
        assert metric.unit
        assert bool(metric.alarm) == (metric.healthy is not None), f"{name}: a range and its alarm text go together"
        if metric.healthy is not None:
            assert metric.healthy[0] < metric.healthy[1]
            assert metric.patience >= 1
        assert set(re.findall(r"<(\w+)>", name)) <= set(PLACEHOLDERS)
        assert name not in ("step", "time", "alarm", "metric", "text", "value", "nonfinite"), "keys of the event file"


@pytest.mark.parametrize(
    ("name", "registered"),
    [
        ("loss", "loss"),
        ("loss/policy", "loss/<term>"),
        ("verdict/no_answer", "verdict/<status>"),
        ("score/format", "score/<verifier>"),
        ("eval/gsm8k/greedy", "eval/<benchmark>/greedy"),
        ("eval/gsm8k/greedy_low", "eval/<benchmark>/greedy_low"),
        ("eval/openai/gsm8k/avg@4_high", "eval/<benchmark>/avg@<k>_high"),
        ("eval/chain_sum-l3/pass@16", "eval/<benchmark>/pass@<k>"),
        ("eval/chain_sum-l3/pass@16_low", "eval/<benchmark>/pass@<k>_low"),
        ("eval/a.b/truncated_share", "eval/<benchmark>/truncated_share"),
    ],
)
def test_names_resolve(name: str, registered: str) -> None:
    assert require(name) is METRICS[registered]


def test_every_verdict_has_a_share() -> None:
    assert {require(f"verdict/{status}").name for status in Status} == {"verdict/<status>"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rewards", "'reward'"),
        ("verdict/maybe", "'verdict/<status>'"),
        ("eval/gsm8k/pass@many", "eval/<benchmark>/pass@<k>,"),
        ("eval//greedy", "'eval/<benchmark>/greedy'"),
        ("verdict/<status>", "'verdict/<status>'"),
        ("loss/", "'loss"),
        ("loss/a/b", "'loss'"),
        ("xreward", "'reward'"),
    ],
)
def test_unregistered_names_are_refused(name: str, hint: str) -> None:
    with pytest.raises(MetricError, match="unregistered metric") as error:
        require(name)
    assert hint in str(error.value)
    assert isinstance(error.value, PosttrainError) and isinstance(error.value, KeyError)


def test_what_is_shown_and_drawn_is_registered() -> None:
    for name in [column.metric for column in COLUMNS] + [name for panel in PANELS for name in panel.metrics]:
        require(name)


def test_page_agrees_with_registry() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_table(), (
        "run: python -m posttrain.tracking.metrics > docs/metrics.md"
    )


def test_page_has_every_metric_once() -> None:
    for name in METRICS:
        assert metrics_table().count(f"| `{name}` |") == 1


def test_tracking_does_not_load_torch_or_matplotlib() -> None:
    code = "import sys, posttrain.tracking.tracker, posttrain.tracking.live, posttrain.tracking.ledger\n"
    code += "print([m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------- reduction


def test_weighted_mean_weighs_by_count() -> None:
    means = Means()
    means.add("reward", 3.0, 4)  # four completions with mean 0.75
    means.add("reward", 0.0, 12)  # twelve with mean 0
    assert means.result() == {"reward": 3.0 / 16}  # the mean of means would be 0.375


@pytest.mark.parametrize(
    ("name", "pairs", "expected"),
    [
        ("reward", [(1.0, 2), (2.0, 4)], 0.5),
        ("reward", [(1.0, 2), (0.0, 0)], 0.5),
        ("tokens_trained", [(100, 1), (28, 1)], 128.0),
        ("ratio_max", [(1.5, 10), (1.2, 10), (7.0, 1), (2.0, 99)], 7.0),
        ("ratio_max", [(-3.0, 1), (-5.0, 1)], -3.0),
        ("learning_rate", [(1e-3, 1), (5e-4, 1)], 5e-4),
        ("reward", [(math.nan, 1), (1.0, 1)], math.nan),
        ("ratio_max", [(math.nan, 1), (1.0, 1)], math.nan),
        ("ratio_max", [(1.0, 1), (math.nan, 1)], math.nan),
    ],
)
def test_reducers(name: str, pairs: list[tuple[float, float]], expected: float) -> None:
    means = Means()
    for total, count in pairs:
        means.add(name, total, count)
    assert means.result()[name] == pytest.approx(expected, nan_ok=True)


def test_merge_over_ranks_equals_one_rank() -> None:
    data = [("reward", 1.0, 3), ("ratio_max", 2.0, 5), ("tokens_trained", 7, 1), ("reward", 4.0, 5), ("kl", 0.5, 8)]
    one, ranks = Means(), [Means(), Means()]
    for number, item in enumerate(data):
        one.add(*item)
        ranks[number % 2].add(*item)
    merged = Means()
    merged.merge(ranks[0].state_dict())
    merged.merge(ranks[1])
    assert merged.result() == one.result() == {"kl": 0.0625, "ratio_max": 2.0, "reward": 0.625, "tokens_trained": 7.0}


def test_no_data_is_left_out() -> None:
    means = Means()
    means.add("reward", 0.0, 0)
    assert means.result() == {}


def test_state_restores() -> None:
    means, restored = Means(), Means()
    means.add("reward", 1.0, 4)
    restored.load_state_dict(means.state_dict())
    for each in (means, restored):
        each.add("reward", 3.0, 4)
    assert restored.result() == means.result() == {"reward": 0.5}


def test_what_nobody_has_declared_is_a_mean(undeclared) -> None:
    means = Means()
    means.add("rewrad", 3.0, 2)
    means.add("rewrad", 1.0, 2)
    assert means.result() == {"rewrad": 1.0}


def test_bad_additions_are_refused() -> None:
    with pytest.raises(ValueError, match="count -1"):
        Means().add("reward", 1.0, -1)
