"""NLPO: PPO that draws its tokens, and measures its ratio, within what a lagging copy of the policy finds likely.

The copy is the mask model: in every state the tokens of its nucleus are allowed, all others have probability 0. With
`top_p: 1` nothing is masked, and the method is PPO.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor
from posttrain.methods.companions import UNMASKED_LOGPS, MaskModel
from posttrain.methods.ppo import PPO, PPOConfig
from posttrain.objectives.action_mask import MaskRule
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import TokenBatch


class NLPOConfig(PPOConfig):
    name: Literal["nlpo"] = "nlpo"  # type: ignore[assignment]  # a method of its own
    top_p: float = Field(
        0.9, gt=0, le=1, description="mass of the mask model that the allowed tokens reach; 1: no mask"
    )
    min_tokens_to_keep: int = Field(
        100, ge=1, description="likeliest tokens of the mask model that are always allowed; below the vocabulary"
    )
    mask_update_interval: int = Field(
        5, ge=1, description="rollouts between copies of the policy into the mask model (mu; authors: iterations)"
    )
    gamma: float = Field(0.99, gt=0, le=1, description="discount per token")
    vf_coef: float = Field(0.5, gt=0, description="weight of the value loss")
    value_clip: float | None = Field(None, gt=0, description="how far a value may move from the old one; null: no clip")
    kl_coef: float = Field(0.1, ge=0, description="weight of the KL in the reward, of log-probs without the mask")
    epochs: int = Field(5, ge=1, description="passes over one batch of rollouts")

    @model_validator(mode="after")
    def _masked(self) -> NLPOConfig:
        if self.kl_in == "loss":
            raise ValueError("nlpo has the KL in the reward, of log-probs without the mask: leave out kl_in")
        idle = sorted(self.model_fields_set & {"min_tokens_to_keep", "mask_update_interval"})
        if self.top_p == 1 and idle:
            raise ValueError(f"{', '.join(idle)}: no effect with top_p 1, which masks nothing")
        return self


class NLPO(PPO):
    Config = NLPOConfig
    config: NLPOConfig
    paper = "Is Reinforcement Learning (Not) for Natural Language Processing (RL4LMs, NLPO), arXiv 2210.01241"

    @property
    def needs(self) -> Needs:
        c = self.config
        rule = MaskRule(c.top_p, c.min_tokens_to_keep, c.mask_update_interval)
        return replace(super().needs, companions=(MaskModel(rule),) if c.top_p < 1 else ())

    def log_ratio(self, batch: TokenBatch) -> Tensor:
        """Of log-probs over the whole vocabulary: the reference knows no mask."""
        if UNMASKED_LOGPS not in batch.further:
            return super().log_ratio(batch)
        return masked(batch.further[UNMASKED_LOGPS] - batch.ref_logps, batch.mask)
