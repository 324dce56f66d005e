"""What methods share that train on rollouts and on expert rows in one step: the policy term is GRPO's, with its
parameters; the expert term is a weighted negative log-likelihood over the experts' own tokens."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, TypeVar

from pydantic import Field

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig, OnlineMethod, Scored
from posttrain.methods.grpo import GRPO, GRPOConfig
from posttrain.objectives.aggregation import aggregate, masked
from posttrain.objectives.batch import LossSum, TokenBatch


class MixedConfig(MethodConfig):
    expert_rows_per_step: int = Field(
        64, ge=1, description="traces per optimizer step (the papers: 64 to 256 rollouts)"
    )
    epsilon: float = Field(0.2, gt=0, description="clip range of the policy term below 1, and above unless given")
    epsilon_high: float | None = Field(None, gt=0, description="clip range above 1; default: epsilon")
    dual_clip: float | None = Field(None, gt=1, description="bound on the loss of tokens with negative advantage")
    aggregation: Literal["sequences", "tokens", "constant"] = Field("tokens", description="mean of the policy term")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="deviation that divides advantages")
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference, on rollouts")
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts")


C = TypeVar("C", bound=MixedConfig)


class Mixed(OnlineMethod[C]):
    """Terms `policy` and `expert`, each normalised over its own tokens: numbers of rows do not change their weights.

    Subclasses give `expert_losses`, and `policy_weight` where it is not 1.
    """

    def __init__(self, config: C) -> None:
        super().__init__(config)
        names = ("epsilon", "epsilon_high", "dual_clip", "aggregation", "scale_rewards", "beta", "updates_per_rollout")
        given: dict[str, Any] = {name: getattr(config, name) for name in names}
        self.policy = GRPO(GRPOConfig(**given))

    @property
    def needs(self) -> Needs:
        rows = self.config.expert_rows_per_step
        return Needs(
            data=("prompts", "traces") if rows else ("prompts",),
            rollouts=True,
            verifier=True,
            reference=self.config.beta > 0,
            min_samples_per_prompt=2,
            expert_rows=rows,
        )

    @property
    def updates_per_rollout(self) -> int:
        return self.config.updates_per_rollout

    @property
    def policy_weight(self) -> float:
        """Factor of the policy term in this step."""
        return 1.0

    @abstractmethod
    def expert_losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor, float]:
        """Per-token losses of expert rows, the weights in them (both (B, T)), and the factor of the whole term."""

    def advantages(self, scored: Scored) -> Tensor:
        return self.policy.advantages(scored)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {**self.policy.counts(batch.rollouts), "expert": batch.experts.mask.sum()}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        policy = self.policy.loss(batch.rollouts)["policy"]
        experts = batch.experts
        losses, weights, factor = self.expert_losses(experts)
        expert = aggregate(losses, experts.mask, "tokens")
        values = {"expert/nll": -experts.logps, "expert/weight": weights}
        if experts.entropies is not None:
            values["expert/entropy"] = experts.entropies
        sums = {name: (masked(v.detach(), experts.mask).sum(), expert.count) for name, v in values.items()}
        return {
            "policy": LossSum(self.policy_weight * policy.value, policy.unit, policy.count, policy.diagnostics),
            "expert": LossSum(factor * expert.value, expert.unit, expert.count, sums),
        }
