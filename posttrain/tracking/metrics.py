"""The metric registry: every number a run may log, with meaning, unit, reducer, healthy range and what to do.

`docs/metrics.md` is made from it: `python -m posttrain.tracking.metrics > docs/metrics.md`. To add a metric: one entry
here, or in `metrics` of the method that alone logs it, then that command. A name may be a family:
`eval/<benchmark>/greedy` covers that name for every benchmark.

One module although it is long: two thirds are the table of entries, which is looked up and extended in one place.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import inf, isinf, isnan
from typing import SupportsFloat

from posttrain.config.metric import Metric
from posttrain.errors import PluginError, PosttrainError, nearest
from posttrain.methods import METHODS
from posttrain.terminal import say
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


def _estimate(name: str, meaning: str) -> tuple[Metric, ...]:
    """A measured accuracy with the ends of its confidence interval."""
    return (
        Metric(name, meaning, "share", "last"),
        Metric(f"{name}_low", f"Lower end of the confidence interval of `{name}`.", "share", "last"),
        Metric(f"{name}_high", f"Upper end of the confidence interval of `{name}`.", "share", "last"),
    )


SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Optimisation": (
        Metric(
            "loss",
            "The optimised loss. Nats per token in supervised runs; with on-policy policy gradients it hovers around 0 "
            "and says nothing about progress: look at reward and accuracy.",
            "nats or surrogate",
        ),
        Metric("loss/<term>", "One term of the loss, before its weight.", "nats or surrogate"),
        Metric(
            "grad_norm",
            "L2 norm of the gradient over all trainable tensors, before clipping.",
            "1",
            "last",
            (1e-8, 100.0),
            "Near zero nothing is learned: look for a frozen model, rows without a trained token, and groups whose "
            "rewards are all equal. If large: lower the learning rate, lengthen the warm-up, scale the rewards down, "
            "and look for a broken batch.",
            3,
        ),
        Metric("learning_rate", "Learning rate of the step.", "1", "last"),
        Metric(
            "skipped_updates",
            "Updates left out since the previous entry because loss or gradient was not finite; absent without any.",
            "updates",
            "sum",
        ),
        Metric("epoch", "Passes over the training data so far.", "passes", "last"),
        Metric("token_accuracy", "Share of trained tokens that are the policy's likeliest token.", "share"),
    ),
    "Sources of a mixture": (
        Metric("source/<source>/epoch", "Passes over the rows of one source so far.", "passes", "last"),
        Metric("source/<source>/share", "Share of all rows drawn so far that are of the source.", "share", "last"),
        Metric(
            "source/<source>/nll", "Negative log-likelihood of the source's trained tokens (sft).", "nats per token"
        ),
        Metric("source/<source>/reward", "`reward` of completions of the source's prompts.", "reward"),
        Metric(
            "source/<source>/accuracy",
            "`accuracy` of completions of the source's prompts. With pairs the share of rows whose chosen response has "
            "gained more log-prob against the reference than the rejected one, or without a reference has more; for a "
            "reward model the share whose chosen response scores higher.",
            "share",
        ),
        Metric("source/<source>/tokens", "`tokens_trained` of the source's rows.", "tokens", "sum"),
        Metric("source/<source>/tokens_total", "The same since the start of the run.", "tokens", "last"),
        Metric(
            "source/<source>/held_out/accuracy", "`held_out/accuracy` of held-out pairs of the source.", "share", "last"
        ),
    ),
    "Reward and verdicts": (
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
    ),
    "Completions": (
        Metric(
            "completion_length",
            "Mean number of sampled tokens per completion, the stop token included.",
            "tokens",
            "weighted_mean",
            (1.5, inf),
            "Completions are all but empty: the policy ends at once. Check stop tokens and chat template, and whether "
            "the reward favours short answers.",
            3,
        ),
        Metric("completion_length/<kind>", "`completion_length` of completions that begin there.", "tokens"),
        Metric("prefix_length", "Mean number of prefix tokens of the completions that have a prefix.", "tokens"),
        Metric(
            "prefix_left_out_share",
            "Share of prompts whose prefix left no room for a token, by `rollouts.max_new_tokens` or the model's "
            "positions: their completions begin at the prompt. With methods that choose prefixes.",
            "share",
            "weighted_mean",
            (-inf, 0.1),
            "The traces are too long to start within. Raise `rollouts.max_new_tokens` if it counts the prefix, drop "
            "long traces with `data.max_length`, or take a model with more positions.",
            3,
        ),
        Metric("guided_length", "Mean number of the last tokens of completions that a guide ended, its own.", "tokens"),
        Metric("completion_length_max", "Length of the longest completion.", "tokens", "max"),
        Metric(
            "truncated_share",
            "Share of completions cut at the length limit, and of episodes that a limit ended.",
            "share",
            "weighted_mean",
            (-inf, 0.25),
            "Many answers never end and are judged without their end. Raise `rollouts.max_new_tokens`, or check that "
            "the policy knows its end token (it must be trained on in the supervised stage). Of episodes `stop/...` "
            "says which limit it was; `environment.max_turns` is one.",
            3,
        ),
        Metric(
            "entropy",
            "Mean entropy of the policy's next-token distribution at trained positions.",
            "nats per token",
            "weighted_mean",
            (0.01, 4.0),
            "Low: the policy has collapsed and no longer explores; lower the learning rate, raise the upper clip "
            "bound or add a KL term. High: it decays into noise; go back to a checkpoint and lower the learning rate.",
            3,
            rises=True,  # a model made from scratch begins with noise
        ),
    ),
    "Episodes": (
        Metric("episode_turns", "Mean number of actions of an episode; with `environment`.", "turns"),
        Metric(
            "invalid_action_share",
            "Share of actions that the environment did not understand or could not do.",
            "share",
            "weighted_mean",
            (-inf, 0.3),
            "The policy does not speak the environment's language. Read `samples.jsonl`; train on some episodes of an "
            "agent first (sft), or lower the learning rate if the share has risen.",
            3,
        ),
        Metric("observation_length", "Mean number of tokens between two actions, template included.", "tokens"),
        Metric(
            "observation_cut_share",
            "Share of observations of which the middle was left out.",
            "share",
            "weighted_mean",
            (-inf, 0.1),
            "The policy does not see what it is told. Raise `environment.observation_tokens` and "
            "`episode_tokens`, or say less.",
            2,
        ),
        Metric("stop/<stop>", "Share of episodes that ended for this reason.", "share"),
        Metric(
            "template_drift_share",
            "Share of the episodes of the first prompt which the chat template, given the text, would show otherwise "
            "than they were sampled.",
            "share",
            "weighted_mean",
            (-inf, 0.05),
            "The policy is trained on turns as it wrote them, and a chat server would show it something else: trimmed "
            "replies, say, or none of the earlier reasoning. Take another template, or serve it with its turns kept.",
            2,
        ),
        Metric("environment_seconds", "Wall clock of environments and of rendering their turns.", "seconds"),
    ),
    "Experts": (
        Metric(
            "router_loss",
            "Load-balancing loss of the routers of a mixture of experts, before `model.router_loss` weighs it: the "
            "number of experts that a token goes to where all are equally busy, larger where they are not.",
            "1",
        ),
        Metric(
            "busiest_expert_share",
            "Share of a layer's tokens, counted once for each expert they go to, that the busiest expert gets; in the "
            "layer where it is largest. 1 / experts where all are equally busy.",
            "share",
            "last",
        ),
    ),
    "Distance between policies": (
        Metric(
            "kl",
            "Estimated KL divergence of the policy from the reference, on sampled tokens.",
            "nats per token",
            "weighted_mean",
            (-inf, 1.0),
            "The policy is far from where it started, often while it games the reward. Read some completions; raise "
            "`beta` or lower the learning rate.",
            2,
        ),
        Metric(
            "kl_sequence",
            "Estimated KL divergence of the policy from the reference, as the mean log-ratio of sampled completions. A "
            "sum over tokens, so it grows with length, and a few samples may put it below 0.",
            "nats per completion",
        ),
        Metric(
            "approx_kl",
            "Estimated KL divergence between the sampling policy and the current one, on sampled tokens.",
            "nats per token",
            "weighted_mean",
            (-inf, 0.1),
            "Updates move too far from the policy that sampled. Lower the learning rate or the updates per rollout.",
            2,
        ),
        Metric(
            "ratio_clamped_share",
            "Share of trained tokens whose log-ratio was beyond +-20 and held there: such a token gives no gradient.",
            "share",
            "weighted_mean",
            (-inf, 0.001),
            "The policy has left the data that it is trained on. Read samples; lower the learning rate, or train on "
            "fresher rollouts.",
            1,
        ),
        Metric(
            "ratio_mean",
            "Mean importance ratio of the current to the sampling policy.",
            "1",
            "weighted_mean",
            (0.8, 1.2),
            "Data are more off-policy than the surrogate can mend. Lower the learning rate or the updates per rollout.",
            3,
        ),
        Metric(
            "ratio_max",
            "Largest importance ratio.",
            "1",
            "max",
            (-inf, 100.0),
            "Single tokens carry huge weights. Check that engine and trainer agree (`engine_logp_diff_max`); lower the "
            "learning rate, the updates per rollout or the age of rollouts.",
            3,
        ),
        Metric(
            "clip_share_low",
            "Share of trained tokens whose ratio is below the lower clip bound and whose gradient is dropped for it.",
            "share",
            "weighted_mean",
            (-inf, 0.4),
            "Much of the batch gives no gradient. Lower the learning rate or the updates per rollout.",
            3,
        ),
        Metric(
            "clip_share_high",
            "Share of trained tokens whose ratio is above the upper clip bound and whose gradient is dropped for it.",
            "share",
            "weighted_mean",
            (-inf, 0.4),
            "Much of the batch gives no gradient. Lower the learning rate or the updates per rollout.",
            3,
        ),
        Metric(
            "rollout_age",
            "Mean number of rollouts between the weights that sampled a completion and those it is first trained with; "
            "logged where rollouts may be stale.",
            "rollouts",
        ),
        Metric("replayed_share", "Share of completions that come from the replay buffer.", "share"),
        Metric(
            "stale_logp_diff_mean",
            "Mean absolute difference of log-probs of sampled tokens between the policy that begins to train on them "
            "and the one that sampled them, staleness and the engine's rounding together; logged where rollouts may be "
            "stale.",
            "nats per token",
        ),
        Metric("stale_logp_diff_max", "Largest difference of that kind.", "nats", "max"),
        Metric(
            "engine_logp_diff_mean",
            "Mean absolute difference of trainer and engine log-probs of sampled tokens at equal weights; with stale "
            "rollouts measured apart, on the last tokens of a few of them.",
            "nats per token",
            "weighted_mean",
            (-inf, 0.05),
            "The engine samples from another policy than the one trained. Look for stale weights, for another dtype "
            "(set `rollouts.vllm.dtype` to that of `model.dtype`), and for dropout, which only training applies "
            "(`model.peft.dropout`).",
        ),
        Metric(
            "engine_weight_mean",
            "Mean weight of trained tokens for the difference of trainer and engine; with `rollouts.importance`.",
            "1",
        ),
        Metric(
            "engine_weight_square",
            "Mean square of these weights; the squared mean over it is the effective share of the tokens.",
            "1",
        ),
        Metric(
            "engine_weight_capped_share",
            "Share of trained tokens whose weight is at a bound of `rollouts.importance`, or was beyond it and is 0.",
            "share",
        ),
        Metric(
            "canary_logp_diff_max",
            "Largest absolute difference of trainer and engine log-probs on the canary tokens after a weight sync; the "
            "run stops above `rollouts.vllm.canary_limit`.",
            "nats",
            "max",
        ),
        Metric(
            "engine_logp_diff_max",
            "Largest absolute difference of trainer and engine log-probs of a sampled token at equal weights.",
            "nats",
            "max",
            (-inf, 3.0),
            "Some tokens are scored quite differently by engine and trainer. Check masks, positions and the dtype.",
            2,
        ),
    ),
    "Preferences": (
        Metric(
            "pairs/loss",
            "Mean loss of the pairs that a step made of its rollouts. The `loss` of such a run is a surrogate: its "
            "gradient is right, its value means nothing.",
            "nats",
        ),
        Metric("pairs/logps_chosen", "Mean log-prob of the chosen completion, summed over tokens.", "nats per pair"),
        Metric(
            "pairs/logps_rejected", "Mean log-prob of the rejected completion, summed over tokens.", "nats per pair"
        ),
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
    ),
    "Critics and offline RL": (
        Metric("critic/loss", "Loss of the value model: squared (or clipped) distance to its targets.", "1"),
        Metric(
            "critic/explained_variance",
            "Share of the variance of their targets that the values explain, over the states that the critic learns: 1 "
            "is perfect, 0 no better than a constant.",
            "share",
        ),
        Metric("critic/value", "Mean value of the states before trained tokens.", "reward"),
        Metric("critic/clip_share", "Share of trained tokens whose value moved beyond the value clip.", "share"),
        Metric("critic/accuracy", "Share of states whose value is on the side of the outcome (dapo_step).", "share"),
        Metric("kl_reward", "KL to the reference at sampling time, whole completions (k1).", "nats per completion"),
        Metric("kl_coef", "Weight of that KL; it moves where `kl_target` is set.", "1"),
    ),
    "Refilled rollouts": (
        Metric("refill/draws", "Groups looked at until enough had a signal, per rollout.", "groups"),
        Metric("refill/surplus", "Groups sampled behind the one that filled the rollout, and not looked at.", "groups"),
        Metric(
            "refill/filled_share",
            "Groups with a signal over those that are wanted.",
            "share",
            "weighted_mean",
            (0.5, inf),
            "Even with all its waves a rollout finds too few groups whose rewards differ. All wrong: use easier "
            "problems, prefixes or a supervised start. All right: use harder problems. Or raise rollouts.refill.waves.",
            patience=5,
        ),
        Metric("refill/factor", "Estimated share of groups with a signal (rollouts.refill.unbiased).", "share"),
        Metric("refill/accuracy", "Share of right completions over all groups looked at.", "share"),
        Metric("refill/thrown_tokens", "Sampled tokens of groups that are not trained on, per rollout.", "tokens"),
    ),
    "Distillation": (
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
    ),
    "Optimal advantages": (
        Metric("a_star_po/advantage", "Outcome less the optimal value that stored samples gave (a_star_po).", "1"),
        Metric("a_star_po/log_ratio", "Log-ratio of policy to start, whole completions.", "nats per completion"),
    ),
    "Expert rows": (
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
    ),
    "Evaluation": (
        *_estimate("eval/<benchmark>/greedy", "Accuracy of the greedy completion."),
        *_estimate("eval/<benchmark>/avg@<k>", "Mean accuracy of k sampled completions."),
        *_estimate("eval/<benchmark>/pass@<k>", "Chance that at least one of k sampled completions is right."),
        *_estimate("eval/<benchmark>/maj@<k>", "Accuracy of the majority answer of k sampled completions."),
        *_estimate("eval/<benchmark>/beam@<k>", "Accuracy of the likeliest completion of a beam search of width k."),
        *_estimate("eval/<benchmark>/revision@<k>", "Accuracy of the greedy answer after k revisions by the model."),
        *_estimate(
            "eval/episodes/solved", "Share of the episodes that are solved; one that nobody could judge is not."
        ),
        Metric("eval/episodes/turns", "Mean number of actions of these.", "actions", "last"),
        Metric("eval/episodes/invalid_action_share", "Share of them that were not understood.", "share", "last"),
        Metric("eval/episodes/unknown_share", "Share of the episodes that nobody could judge.", "share", "last"),
        Metric("eval/<benchmark>/truncated_share", "Share of completions cut at the length limit.", "share", "last"),
        Metric("eval/<benchmark>/unknown_share", "Share of completions that could not be judged.", "share", "last"),
        Metric("eval/<benchmark>/completion_length", "Mean number of sampled tokens.", "tokens", "last"),
        Metric("eval_seconds", "Wall-clock time of the evaluation.", "s", "sum"),
    ),
    "Held-out pairs": (
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
        Metric(
            "held_out/margin", "Log-ratio to the start of chosen minus that of rejected completions.", "nats", "last"
        ),
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
    ),
    "Time and compute": (
        Metric(
            "step_seconds",
            "Wall-clock time since the previous entry, checkpoints included and evaluations between steps not.",
            "s",
            "last",
        ),
        Metric("rollout_seconds", "Time spent sampling, per rollout.", "s"),
        Metric("verify_seconds", "Time spent verifying, per rollout.", "s"),
        Metric(
            "pipeline_overlap_seconds",
            "With `rollouts.pipeline`: time for which a rollout was sampled and verified beside the training.",
            "s",
        ),
        Metric(
            "pipeline_wait_seconds",
            "With `rollouts.pipeline`: time for which the training then still waited for the rollout.",
            "s",
        ),
        Metric("sync_seconds", "Time for one copy of the weights to the vLLM engine.", "s"),
        Metric("update_seconds", "Time spent in forward, backward and optimizer.", "s"),
        Metric("tokens_per_second", "Tokens trained per second of `step_seconds`.", "tokens/s", "last"),
        Metric("tokens_prompt", "Prompt tokens the engine read since the previous entry.", "tokens", "sum"),
        Metric("tokens_sampled", "Tokens sampled since the previous entry.", "tokens", "sum"),
        Metric("tokens_trained", "Tokens passed forward and backward, prompts included.", "tokens", "sum"),
        Metric(
            "tokens_scored",
            "Tokens passed forward only, once for each pass (reference, scorer, old log-probs, a frozen model).",
            "tokens",
            "sum",
        ),
        Metric(
            "flops",
            "Floating-point operations of all models' passes: 2 N per token forward, and backward 2 N and 2 per "
            "trained parameter more, N being those that multiply (6 N where all are trained). Without attention over "
            "the context, verifiers and evaluations.",
            "FLOP",
            "sum",
        ),
        Metric("environment_steps", "Actions that environments answered; only in runs that act in some.", "1", "sum"),
        Metric("cpu_seconds", "Processor seconds of the processes of all ranks.", "s", "sum"),
        Metric("gpu_seconds", "Seconds times GPUs of all ranks; only on GPUs.", "s", "sum"),
        Metric("tokens_prompt_total", "`tokens_prompt` since the start of the run.", "tokens", "last"),
        Metric("tokens_sampled_total", "`tokens_sampled` since the start of the run.", "tokens", "last"),
        Metric("tokens_trained_total", "`tokens_trained` since the start of the run.", "tokens", "last"),
        Metric("tokens_scored_total", "`tokens_scored` since the start of the run.", "tokens", "last"),
        Metric("flops_total", "`flops` since the start of the run.", "FLOP", "last"),
        Metric("environment_steps_total", "`environment_steps` since the start of the run.", "1", "last"),
        Metric("cpu_seconds_total", "`cpu_seconds` since the start of the run, without evaluations.", "s", "last"),
        Metric("gpu_seconds_total", "`gpu_seconds` since the start of the run, without evaluations.", "s", "last"),
        Metric("wall_seconds", "Wall-clock time of the run so far, without pauses between resumes.", "s", "last"),
    ),
}

SECTIONS["Single methods"] = tuple(metric for method in METHODS.values() for metric in vars(method).get("metrics", ()))

METRICS: dict[str, Metric] = {metric.name: metric for section in SECTIONS.values() for metric in section}


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
    say(metrics_table(), nl=False)
