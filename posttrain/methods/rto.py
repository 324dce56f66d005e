"""RTO: PPO whose tokens are rewarded by how much likelier a policy trained by DPO finds them than the reference does.

The reward of the whole completion is still there, at its last token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.config.relative_paths import ModelPath
from posttrain.lazy import Tensor
from posttrain.methods.companions import SCORER_LOGPS, Scorer
from posttrain.methods.ppo import PPO, PPOConfig
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.returns import at_end


class RTOConfig(PPOConfig):
    name: Literal["rto"] = "rto"  # type: ignore[assignment]  # a method of its own
    dpo_model: ModelPath = Field(description="folder or Hub id of the policy that DPO trained from the same start")
    dpo_reward_scale: float = Field(0.05, gt=0, description="beta_1: reward per nat of its log-ratio to the reference")
    dpo_reward_clip: float | None = Field(
        0.05, gt=0, description="bound of a token's scaled reward, either way; null: none"
    )
    reward_mean: float = Field(0.0, description="taken off a completion's reward; that of a reward model's outputs")
    reward_std: float = Field(1.0, gt=0, description="divides what is left; their standard deviation")
    reward_clip: float = Field(10.0, gt=0, description="bound of a completion's normalised reward, either way")
    kl_coef: float = Field(0.01, ge=0, description="beta_2: weight of the KL in the reward")

    @model_validator(mode="after")
    def _in_the_reward(self) -> RTOConfig:
        if self.kl_in == "loss":
            raise ValueError("rto has the KL in the reward: leave out kl_in")
        return self


class RTO(PPO):
    Config = RTOConfig
    config: RTOConfig
    paper = "DPO Meets PPO: Reinforced Token Optimization for RLHF, arXiv 2404.18922"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, reference=True, companions=(Scorer(self.config.dpo_model),))

    def token_rewards(self, batch: TokenBatch) -> Tensor:
        """(B, T): clip(beta_1 log pi_dpo / pi_ref) - beta_2 log pi_old / pi_ref, at the end clip((r - mean) / std).

        Scaled first, then clipped; the reference is that of the KL (authors' code).
        """
        c = self.config
        dense = c.dpo_reward_scale * masked(batch.further[SCORER_LOGPS] - batch.ref_logps, batch.mask)
        if c.dpo_reward_clip is not None:
            dense = dense.clamp(-c.dpo_reward_clip, c.dpo_reward_clip)
        kl = self.kl_coef * self.log_ratio(batch)
        rewards = ((batch.advantages - c.reward_mean) / c.reward_std).clamp(-c.reward_clip, c.reward_clip)
        return dense - kl + at_end(rewards, batch.mask)
