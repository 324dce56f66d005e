"""What is logged of verdicts and of the rewards that they make."""

from __future__ import annotations

from math import inf

from posttrain.config.metric import Metric

VERDICTS = (
    Metric("reward", "Mean reward of the judged completions: outcome plus shaping. What is optimised.", "reward"),
    Metric("reward_std", "Standard deviation of rewards within a group, averaged over completions.", "reward"),
    Metric("accuracy", "Mean outcome of the judged completions, without shaping.", "share"),
    Metric(
        "reward/<kind>",
        "`reward` of completions that begin there: at the prompt, a prefix or a reset; `guided`: ended by a guide.",
        "reward",
    ),
    Metric("accuracy/<kind>", "`accuracy` of completions that begin there.", "share"),
    Metric("score/<verifier>", "Mean score of one verifier over the completions it judged.", "score"),
    Metric(
        "informative_groups",
        "Share of groups whose rewards differ. The others give no policy gradient.",
        "share",
        "weighted_mean",
        (0.02, inf),
        "Hardly any group has both good and bad answers, so nothing is learned. All wrong: use easier problems, a "
        "supervised start or prefixes. All right: use harder problems. Or sample more per prompt.",
        5,
    ),
    Metric("zero_advantage_share", "Share of completions with advantage exactly 0.", "share"),
    Metric(
        "unknown_share",
        "Share of completions the verifier could not judge (bad reference, timeout, crash). Not trained on.",
        "share",
        "weighted_mean",
        (-inf, 0.05),
        "The verifier fails, not the model. See which `verdict/...` share grows; raise `verifier_pool.timeout` or "
        "mend the references or the verifier.",
        2,
    ),
    Metric("verdict/<status>", "Share of completions with this verdict.", "share"),
)
