"""What is logged of episodes."""

from __future__ import annotations

from math import inf

from posttrain.config.metric import Metric

EPISODES = (
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
)
