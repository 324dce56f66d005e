"""Lite PPO: GRPO's group-mean baseline, the batch's standard deviation, the token mean, and nothing else."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.methods.base import MethodConfig
from posttrain.methods.grpo import GRPO, GRPOConfig


class LitePPOConfig(MethodConfig):
    name: Literal["lite_ppo"] = "lite_ppo"
    epsilon: float = Field(0.2, gt=0, description="clip range on both sides of 1")
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts")


class LitePPO(GRPO):
    """Two of GRPO's parameters fixed: `scale_rewards: batch`, `aggregation: tokens`; no KL, no clip-higher."""

    Config = LitePPOConfig
    paper = "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning, arXiv 2508.08221"

    def __init__(self, config: LitePPOConfig) -> None:
        super().__init__(
            GRPOConfig(
                epsilon=config.epsilon,
                updates_per_rollout=config.updates_per_rollout,
                scale_rewards="batch",
                aggregation="tokens",
            )
        )
