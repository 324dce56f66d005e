"""RLSP: GRPO on correctness plus a reward for searching, which is kept apart from the verifier's outcome."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from posttrain.lazy import Tensor, torch
from posttrain.methods.base import Scored
from posttrain.methods.grpo import GRPO, GRPOConfig
from posttrain.objectives.exploration import groups_that_differ, mixed_reward, search_reward


class RLSPConfig(GRPOConfig):
    """The policy gradient has all parameters of `grpo`."""

    name: Literal["rlsp"] = "rlsp"  # type: ignore[assignment]  # a method of its own
    alpha: float = Field(
        1.0, ge=0, le=1, description="share of correctness and length; the rest is for the recipe's shaping verifiers"
    )
    no_answer: float = Field(0.5, ge=0, description="what a completion without an answer loses")
    length_cost: float = Field(0.0, ge=0, description="c of the term -c / tokens, which asks for longer completions")
    filter: Literal["none", "outcome"] = Field(
        "none", description="outcome: no training on groups whose outcomes are all equal, however the rewards differ"
    )

    @model_validator(mode="after")
    def _one_mixture(self) -> RLSPConfig:
        if self.terms is not None and (self.terms.outcome is None or self.terms.shaping is not None):
            raise ValueError("terms of rlsp need outcome and take no shaping, which alpha mixes into it")
        return self


class RLSP(GRPO):
    """Reward alpha (outcome - no_answer - c / tokens) + (1 - alpha) E, where E is what shaping verifiers add.

    E is the recipe's reward minus the outcome, so the verifier of the outcome must have weight 1. The paper trains by
    PPO with a critic; this is the critic-free form. `accuracy` in the logs is the outcome, never the shaped reward.
    """

    Config = RLSPConfig
    paper = "On the Emergence of Thinking in LLMs I: Searching for the Right Intuition, arXiv 2502.06773"
    config: RLSPConfig

    def advantages(self, scored: Scored) -> Tensor:
        c = self.config
        unanswered = torch.tensor([verdict == "no_answer" for verdict in scored.verdicts])
        search = search_reward(scored.outcomes, unanswered, scored.lengths, c.no_answer, c.length_cost)
        rewards = mixed_reward(search, scored.rewards - scored.outcomes, c.alpha)
        advantages = super().advantages(replace(scored, rewards=rewards))
        return torch.where(self._informative(scored), advantages, torch.zeros_like(advantages))

    def keep(self, scored: Scored) -> Tensor:
        return super().keep(scored) & self._informative(scored)

    def _informative(self, scored: Scored) -> Tensor:
        if self.config.filter == "none":
            return scored.known
        return groups_that_differ(scored.outcomes, scored.groups, scored.known)
