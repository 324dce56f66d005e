"""Which metrics are drawn together: the panels of `plots/curves.png` and of the report. Knows no method.

A run shows the panels of what it logged, so a preference run has those of pairs and one with a critic those of values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.tracking.metrics import METRICS, require

LOG_FROM = 100.0
"""A panel of positive values is logarithmic where the largest is this many times the median."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram of a page of curves.

    Attributes:
        title: above the panel.
        metrics: drawn into it, those that the run has.
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


def evaluation_metrics(logged: Iterable[str]) -> list[str]:
    """Of each benchmark the greedy and the mean sampled accuracy, those that there are."""
    drawn = (METRICS["eval/<benchmark>/greedy"], METRICS["eval/<benchmark>/avg@<k>"])
    return sorted(name for name in logged if name.startswith("eval/") and require(name) in drawn)
