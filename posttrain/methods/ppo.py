"""PPO: a value model beside the policy, generalised advantage estimates, the clipped surrogate and value loss.

The reward of a completion (verifiers, a reward model, or both) is given at its last token; a KL to the starting policy
is taken off every token's reward (`kl_in: reward`) or added to the loss.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import ActorCriticMethod, Estimates, MethodConfig, Scored
from posttrain.objectives.aggregation import aggregate, count, masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.policy_gradient import (
    clipped_shares,
    clipped_surrogate,
    importance_ratio,
    kl_k3,
    log_ratio,
    out_of_bounds,
)
from posttrain.objectives.returns import at_end, clipped_value_loss, gae


class PPOConfig(MethodConfig):
    name: Literal["ppo"] = "ppo"
    epsilon: float = Field(0.2, gt=0, description="clip range of the ratio around 1")
    value_clip: float | None = Field(0.2, gt=0, description="how far a value may move from the old one; null: no clip")
    vf_coef: float = Field(0.1, gt=0, description="weight of the value loss")
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of GAE: 0 one-step, 1 Monte Carlo")
    kl_coef: float = Field(0.05, ge=0, description="weight of the KL to the starting policy, in units of the reward")
    kl_in: Literal["reward", "loss"] = Field("reward", description="k1 off the token rewards, or k3 in the loss")
    kl_target: float | None = Field(
        None, gt=0, description="nats per completion that kl_coef is steered to; null: kl_coef stays"
    )
    kl_horizon: int = Field(10_000, ge=1, description="completions over which kl_coef follows; with kl_target")
    whiten_rewards: bool = Field(
        False, description="token rewards, KL included, divided by their deviation over a rollout; their mean stays"
    )
    whiten_advantages: bool = Field(True, description="mean 0 and variance 1 over the trained tokens of a rollout")
    missing_eos_reward: float | None = Field(
        None, description="reward of completions cut at the length limit, in place of their own (-1 in DR-PO's code)"
    )
    epochs: int = Field(4, ge=1, description="passes over one batch of rollouts")
    minibatches: int = Field(
        1, ge=1, description="optimizer steps in a pass; rollouts are of so many times batch.prompts_per_step prompts"
    )

    @model_validator(mode="after")
    def _effective(self) -> PPOConfig:
        if self.kl_target is None and "kl_horizon" in self.model_fields_set:
            raise ValueError("kl_horizon has no effect without kl_target")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target moves kl_coef by factors, so kl_coef must start above 0")
        if self.kl_target is not None and self.kl_in == "loss":
            raise ValueError("kl_target steers the KL in the reward: set kl_in: reward, or leave kl_target out")
        return self


class PPO(ActorCriticMethod[PPOConfig]):
    Config: ClassVar[type[MethodConfig]] = PPOConfig
    paper = "Proximal Policy Optimization Algorithms, arXiv 1707.06347; on language models, arXiv 1909.08593"

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.kl_coef = config.kl_coef

    @property
    def needs(self) -> Needs:
        return Needs(
            data=("prompts",),
            rollouts=True,
            verifier=True,
            reference=self.config.kl_coef > 0,
            minibatches=self.config.minibatches,
            old_logps=True,
            critic=True,
        )

    @property
    def updates_per_rollout(self) -> int:
        return self.config.epochs * self.config.minibatches

    @property
    def whitens(self) -> bool:
        return self.config.whiten_advantages

    @property
    def whitens_rewards(self) -> bool:
        return self.config.whiten_rewards

    def advantages(self, scored: Scored) -> Tensor:
        """Rewards of whole completions; `estimate` makes advantages of them."""
        rewards, penalty = scored.rewards, self.config.missing_eos_reward
        if penalty is not None:
            rewards = torch.where(scored.finished, rewards, torch.full_like(rewards, penalty))
        return torch.where(scored.known, rewards, torch.zeros_like(rewards))

    def token_rewards(self, batch: TokenBatch) -> Tensor:
        """(B, T): the completion's reward at its last token, less the KL."""
        rewards = at_end(batch.advantages, batch.mask)
        if self.config.kl_in == "reward" and self.kl_coef > 0:
            rewards = rewards - self.kl_coef * self.log_ratio(batch)
        return rewards

    def log_ratio(self, batch: TokenBatch) -> Tensor:
        """(B, T): log pi_old / pi_ref on the policy's tokens, which the KL in the reward is made of."""
        return masked(batch.old_logps - batch.ref_logps, self.policy_mask(batch))

    def policy_mask(self, batch: TokenBatch) -> Tensor:
        """(B, T): the tokens that the policy loss is over."""
        return batch.mask

    def estimate(self, batch: TokenBatch, rewards: Tensor) -> Estimates:
        c = self.config
        advantages, returns = gae(rewards, batch.old_values, batch.mask, c.gamma, c.lam)
        kl = None
        if batch.ref_logps is not None:
            kl = self.log_ratio(batch).sum(dim=1)
        return Estimates(advantages, returns, kl)

    def settle(self, kl: float, completions: int) -> None:
        """Adaptive KL (arXiv 1909.08593, section 2.2): a proportional controller on the logarithm of kl_coef."""
        if self.config.kl_target is not None:
            error = min(max(kl / self.config.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * completions / self.config.kl_horizon

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": count(self.policy_mask(batch), "tokens"), "value": count(self.value_mask(batch), "tokens")}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        c, mask = self.config, self.policy_mask(batch)
        ratio = importance_ratio(batch.logps, batch.old_logps, mask)
        losses = clipped_surrogate(ratio, batch.advantages, c.epsilon, c.epsilon)
        low, high = clipped_shares(ratio, batch.advantages, c.epsilon, c.epsilon)
        seen = {"clip_share_low": low, "clip_share_high": high, "ratio_mean": ratio}
        if batch.old_logps is not None:
            seen["approx_kl"] = kl_k3(batch.old_logps, batch.logps)
            seen["ratio_clamped_share"] = out_of_bounds(log_ratio(batch.logps, batch.old_logps, mask))
        if c.kl_in == "loss" and c.kl_coef > 0:
            seen["kl"] = kl_k3(batch.logps, batch.ref_logps)
            losses = losses + c.kl_coef * seen["kl"]
        if c.kl_target is not None:
            seen["kl_coef"] = torch.full_like(losses, self.kl_coef)
        errors = clipped_value_loss(batch.values, batch.old_values, batch.returns, c.value_clip)
        values = {"critic/loss": errors, "critic/value": batch.values}
        if c.value_clip is not None:
            values["critic/clip_share"] = ((batch.values - batch.old_values).abs() > c.value_clip).to(errors.dtype)

        def term(losses: Tensor, seen: dict[str, Tensor], mask: Tensor) -> LossSum:
            total = aggregate(losses, mask, "tokens")
            means = {k: (masked(v.detach(), mask).sum(), mask.sum()) for k, v in seen.items()}
            return LossSum(total.value, total.unit, total.count, means)

        return {"policy": term(losses, seen, mask), "value": term(c.vf_coef * errors, values, self.value_mask(batch))}

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef} if self.config.kl_target is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.config.kl_target is not None:
            self.kl_coef = state["kl_coef"]
        else:
            super().load_state_dict(state)
