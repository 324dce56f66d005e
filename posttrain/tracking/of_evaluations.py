"""What evaluations log, between steps and at the end."""

from __future__ import annotations

from math import inf

from posttrain.config.metric import Metric


def _estimate(name: str, meaning: str) -> tuple[Metric, ...]:
    """A measured accuracy with the ends of its confidence interval."""
    return (
        Metric(name, meaning, "share", "last"),
        Metric(f"{name}_low", f"Lower end of the confidence interval of `{name}`.", "share", "last"),
        Metric(f"{name}_high", f"Upper end of the confidence interval of `{name}`.", "share", "last"),
    )


EVALUATION = (
    *_estimate("eval/<benchmark>/greedy", "Accuracy of the greedy completion."),
    *_estimate("eval/<benchmark>/avg@<k>", "Mean accuracy of k sampled completions."),
    *_estimate("eval/<benchmark>/pass@<k>", "Chance that at least one of k sampled completions is right."),
    *_estimate("eval/<benchmark>/maj@<k>", "Accuracy of the majority answer of k sampled completions."),
    *_estimate("eval/<benchmark>/beam@<k>", "Accuracy of the likeliest completion of a beam search of width k."),
    *_estimate("eval/<benchmark>/revision@<k>", "Accuracy of the greedy answer after k revisions by the model."),
    *_estimate("eval/episodes/solved", "Share of the episodes that are solved; one that nobody could judge is not."),
    Metric("eval/episodes/turns", "Mean number of actions of these.", "actions", "last"),
    Metric("eval/episodes/invalid_action_share", "Share of them that were not understood.", "share", "last"),
    Metric("eval/episodes/unknown_share", "Share of the episodes that nobody could judge.", "share", "last"),
    Metric("eval/<benchmark>/truncated_share", "Share of completions cut at the length limit.", "share", "last"),
    Metric("eval/<benchmark>/unknown_share", "Share of completions that could not be judged.", "share", "last"),
    Metric("eval/<benchmark>/completion_length", "Mean number of sampled tokens.", "tokens", "last"),
    Metric("eval_seconds", "Wall-clock time of the evaluation.", "s", "sum"),
)

HELD_OUT = (
    *_estimate(
        "held_out/accuracy",
        "Share of held-out pairs whose chosen completion gained more log-prob since the start than the rejected "
        "one, as a mean over prompts; ties are not right.",
    ),
    Metric("held_out/ties", "Share of pairs whose log-ratios are equal (within 1e-6).", "share", "last"),
    Metric(
        "held_out/accuracy_per_token",
        "Share of held-out pairs whose chosen completion has the larger log-prob per token; no reference.",
        "share",
        "last",
    ),
    Metric("held_out/margin", "Log-ratio to the start of chosen minus that of rejected completions.", "nats", "last"),
    Metric("held_out/logps_chosen", "Mean log-prob of held-out chosen completions.", "nats per pair", "last"),
    Metric("held_out/logps_rejected", "Mean log-prob of held-out rejected completions.", "nats per pair", "last"),
    Metric(
        "held_out/chosen_shift",
        "Log-ratio of policy to start on held-out chosen completions, per token. Below 0 they have become less "
        "likely (likelihood displacement).",
        "nats per token",
        "last",
        (-0.5, inf),
        "Completions that people chose, and that were not trained on, become unlikely. As for "
        "`pairs/chosen_shift`: read samples, lower the learning rate, raise `beta`, or add likelihood of chosen.",
        2,
    ),
    Metric("held_out/length_difference", "Mean length of chosen minus that of rejected.", "tokens", "last"),
    Metric(
        "held_out/kl",
        "KL divergence of the policy from the start: mean log-ratio of completions sampled for held-out prompts. A "
        "few samples may put it below 0.",
        "nats per completion",
        "last",
    ),
    Metric("held_out/kl_low", "Lower end of the 95% interval of `held_out/kl` over prompts.", "nats", "last"),
    Metric("held_out/kl_high", "Upper end of the 95% interval of `held_out/kl` over prompts.", "nats", "last"),
    Metric("held_out/completion_length", "Mean length of completions of held-out prompts.", "tokens", "last"),
    Metric("held_out/truncated_share", "Share of them cut at the length limit.", "share", "last"),
)
