"""Which metrics are drawn together: the panels of `plots/curves.png` and of the report. Knows no method.

A run shows the panels of what it logged, so a preference run has those of pairs and one with a critic those of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from posttrain.tracking.metrics import METRICS, require

LOG_FROM = 100.0
"""A panel of positive values is logarithmic where the largest is this many times the median."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram of a page of curves.

    Attributes:
        title: above the panel.
        metrics: drawn into it, those that the run has; of a family (`source/<source>/share`) all members.
        evaluations: also draws the evaluations' points.
        log: may turn logarithmic.
        zero: begins at 0.
        smooth: long curves are drawn with a moving average.
    """

    title: str
    metrics: tuple[str, ...]
    evaluations: bool = False
    log: bool = False
    zero: bool = False
    smooth: bool = True


PANELS = (
    Panel("Reward and accuracy", ("reward", "accuracy"), evaluations=True),
    Panel("Pair accuracy", ("pairs/accuracy", "held_out/accuracy", "held_out/accuracy_per_token")),
    Panel("Accuracy on labels", ("unpaired/accuracy", "prm/accuracy", "prm/first_error")),
    Panel("Margin of pairs", ("pairs/margin",)),
    Panel("Rewards of labelled completions", ("unpaired/reward_good", "unpaired/reward_bad")),
    Panel("Log-probs of pairs", ("pairs/logps_chosen", "pairs/logps_rejected")),
    Panel("Margin of held-out pairs", ("held_out/margin",)),
    Panel("Log-probs of held-out pairs", ("held_out/logps_chosen", "held_out/logps_rejected")),
    Panel("Shift of chosen completions", ("pairs/chosen_shift", "held_out/chosen_shift")),
    Panel("Rows by source", ("source/<source>/share",), zero=True, smooth=False),
    Panel("Tokens trained by source", ("source/<source>/tokens_total",), zero=True, smooth=False),
    Panel("Reward by source", ("source/<source>/reward",)),
    Panel("Accuracy by source", ("source/<source>/accuracy", "source/<source>/held_out/accuracy")),
    Panel("Loss by source", ("source/<source>/nll",)),
    Panel("Loss", ("loss",)),
    Panel("Token accuracy", ("token_accuracy",)),
    Panel("Values", ("critic/value", "oreo/value_start")),
    Panel("Explained variance of values", ("critic/explained_variance",)),
    Panel("Loss of the critic", ("critic/loss",), log=True),
    Panel("KL to the reference", ("kl",), log=True),
    Panel("KL to the sampling policy", ("approx_kl",), log=True),
    Panel("Divergence from the teacher", ("teacher/divergence", "teacher/kl")),
    Panel("KL to the start", ("held_out/kl",)),
    Panel("Entropy", ("entropy",)),
    Panel("Completion length", ("completion_length",)),
    Panel("Turns of episodes", ("episode_turns",)),
    Panel("Lost turns", ("invalid_action_share", "observation_cut_share")),
    Panel("Lost completions", ("truncated_share", "unknown_share")),
    Panel("Learning signal", ("informative_groups", "zero_advantage_share")),
    Panel("Clipped tokens", ("clip_share_low", "clip_share_high")),
    Panel("Gradient norm", ("grad_norm",), log=True),
    Panel("Learning rate", ("learning_rate",), zero=True, smooth=False),
    Panel("Time", ("step_seconds", "rollout_seconds", "verify_seconds", "update_seconds"), log=True, zero=True),
)


def panels_of(logged: Iterable[str]) -> list[Panel]:
    """The panels of what a run logged, each with the metrics that are there; evaluations have one in any case."""
    names = list(logged)
    found = [replace(panel, metrics=_members(panel, names)) for panel in PANELS]
    found = [panel for panel in found if panel.metrics]
    if evaluation_metrics(names) and not any(panel.evaluations for panel in found):
        found.insert(0, Panel("Evaluation", (), evaluations=True))
    return found


def _members(panel: Panel, names: Sequence[str]) -> tuple[str, ...]:
    """Of the names those of a panel, in its order; the members of a family in order of name."""
    found: list[str] = []
    for metric in panel.metrics:
        head, family, tail = metric.partition("<source>")
        own = [name for name in names if name.startswith(head) and name.endswith(tail)] if family else []
        found += sorted(name for name in own if "/" not in name[len(head) : len(name) - len(tail)])
        found += [metric] if metric in names else []
    return tuple(found)


def evaluation_metrics(logged: Iterable[str]) -> list[str]:
    """Of each benchmark the greedy and the mean sampled accuracy, those that there are."""
    drawn = (METRICS["eval/<benchmark>/greedy"], METRICS["eval/<benchmark>/avg@<k>"])
    return sorted(name for name in logged if name.startswith("eval/") and require(name) in drawn)
