"""What the shells log of a step, of the completions that it is made of, and of what stands beside the policy."""

from __future__ import annotations

from math import inf

from posttrain.config.metric import Metric

OPTIMISATION = (
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
)

SOURCES = (
    Metric("source/<source>/epoch", "Passes over the rows of one source so far.", "passes", "last"),
    Metric("source/<source>/share", "Share of all rows drawn so far that are of the source.", "share", "last"),
    Metric("source/<source>/nll", "Negative log-likelihood of the source's trained tokens (sft).", "nats per token"),
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
)

COMPLETIONS = (
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
)

EXPERTS = (
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
)

DISTANCES = (
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
)

CRITICS = (
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
)

REFILLED = (
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
)
