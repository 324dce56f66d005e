"""What several methods log; what one alone logs stands in its class."""

from __future__ import annotations

from math import inf

from posttrain.config.metric import Metric

PREFERENCES = (
    Metric(
        "pairs/loss",
        "Mean loss of the pairs that a step made of its rollouts. The `loss` of such a run is a surrogate: its "
        "gradient is right, its value means nothing.",
        "nats",
    ),
    Metric("pairs/logps_chosen", "Mean log-prob of the chosen completion, summed over tokens.", "nats per pair"),
    Metric("pairs/logps_rejected", "Mean log-prob of the rejected completion, summed over tokens.", "nats per pair"),
    Metric(
        "pairs/chosen_shift",
        "Log-ratio of policy to reference on chosen (or best, or trained) completions, per token. Below 0 they are "
        "less likely than under the reference (likelihood displacement).",
        "nats per token",
        "weighted_mean",
        (-0.5, inf),
        "The margin grows while the chosen completions themselves become unlikely, so the probability goes to "
        "completions that nobody has seen. Some decline is common; this much deserves a look at samples. Lower the "
        "learning rate, raise `beta`, or add likelihood of chosen. The bound is a rule of thumb.",
        3,
    ),
    Metric("pairs/reward_chosen", "Mean implicit reward of chosen completions, as the loss compares it.", "reward"),
    Metric("pairs/reward_rejected", "Mean implicit reward of rejected completions.", "reward"),
    Metric("pairs/margin", "Mean implicit reward of chosen minus that of rejected completions.", "reward"),
    Metric(
        "pairs/accuracy",
        "Share of pairs whose chosen completion has the larger implicit reward, ties not counted.",
        "share",
    ),
    Metric(
        "pairs/ties",
        "Share of pairs whose implicit rewards are equal (within 1e-6): neither right nor wrong. All, as long as "
        "policy and reference are the same.",
        "share",
        "weighted_mean",
        (-inf, 0.9),
        "Pairs do not come apart: chosen and rejected are cut to the same tokens, or nothing is learned. Raise "
        "`data.max_length` and the learning rate, and look at pairs in `posttrain report`.",
        5,
    ),
    Metric("pairs/length_difference", "Mean length of chosen minus that of rejected completions.", "tokens"),
    Metric(
        "pairs/saturated",
        "Share of pairs whose gradient weight is below 1% of its maximum: the loss has all but learned them.",
        "share",
    ),
    Metric(
        "pairs/clamped",
        "Share of pairs where a formula's argument was clamped to stay finite; such a response gives no gradient.",
        "share",
        "weighted_mean",
        (-inf, 0.05),
        "The policy is so far from the reference, or so sure of a completion, that the formula overflows. Lower "
        "the learning rate or go back to a checkpoint.",
    ),
    Metric("unpaired/reward_good", "Mean implicit reward of completions that are labelled good.", "reward"),
    Metric("unpaired/reward_bad", "Mean implicit reward of completions that are labelled bad.", "reward"),
    Metric(
        "unpaired/reference_point",
        "What rewards are held against: beta times the estimated KL of policy and reference (KTO), or the mean "
        "reward of all rows so far (BCO).",
        "reward",
    ),
    Metric(
        "unpaired/accuracy",
        "Share of completions on their label's side of the reference point.",
        "share",
    ),
    Metric("unpaired/good_share", "Share of the step's completions that are labelled good.", "share"),
    Metric(
        "unpaired/unmatched",
        "Share of the step's rows for which no other row has another prompt and another completion, so that the KL "
        "is estimated without them.",
        "share",
        "weighted_mean",
        (-inf, 0.5),
        "The KL is estimated from few rows, or not at all: then it is 0, and the loss a plain sigmoid. Raise "
        "`batch.rows_per_step`, or give rows of more prompts.",
        3,
    ),
    Metric("stage", "Stage of the curriculum, from 0.", "1"),
)

DISTILLATION = (
    Metric(
        "teacher/kl",
        "KL of the policy from the teacher on sampled tokens (k3). Should fall; the loss of the policy-gradient "
        "form is the same in a noisier estimate.",
        "nats per token",
    ),
    Metric(
        "teacher/told_share",
        "Share of completions of which the self-teacher was told something, so that they are trained on (sdft).",
        "share",
    ),
    Metric("teacher/logp", "Mean log-prob of sampled tokens under the teacher.", "nats per token"),
    Metric(
        "teacher/divergence",
        "Divergence of the policy from the teacher over the vocabulary, on the policy's own samples.",
        "nats per token",
    ),
)

TERMS = (
    *(
        metric
        for signal in ("outcome", "shaping", "teacher", "process", "entropy")
        for metric in (
            Metric(f"terms/{signal}_size", f"Mean size of the advantage of `terms.{signal}`, within its bound.", "1"),
            Metric(f"terms/{signal}_clipped", f"Share of its tokens whose advantage `terms.{signal}` bounds.", "share"),
            Metric(f"terms/{signal}_rows", f"Share of completions that `terms.{signal}` is for.", "share"),
            Metric(f"terms/{signal}_weight", f"Weight of `terms.{signal}` in the step.", "1"),
        )
    ),
    Metric(
        "terms/process_unscored",
        "Share of completions without a step that the process reward model could score; their advantage by it is 0.",
        "share",
    ),
)

EXPERT_ROWS = (
    Metric(
        "expert/divergence",
        "Divergence of the policy from the teacher over the vocabulary, on the tokens of traces.",
        "nats per token",
    ),
    Metric(
        "expert/nll",
        "Mean negative log-likelihood of the tokens of expert rows, without their weights. How far the policy is "
        "from the expert.",
        "nats per token",
    ),
    Metric("expert/weight", "Mean weight of an expert token (phi in CHORD), without the weight of the term.", "1"),
    Metric("expert/entropy", "Mean entropy of the policy at the tokens of expert rows.", "nats per token"),
)
