"""GRPO and the variants that differ from it by a parameter only.

| variant | parameters |
| --- | --- |
| GRPO (arXiv 2402.03300) | the defaults |
| Dr. GRPO (2503.20783) | `scale_rewards: none`, `aggregation: constant` |
| DAPO's objective (2503.14476) | `aggregation: tokens`, `epsilon_high: 0.28`, `overlong_cache`, `mask_truncated` |
| RLOO (2402.14740) | `baseline: leave_one_out`, `scale_rewards: none`, `ratio: trajectory` |
| GSPO (2507.18071) | `ratio: sequence`, `epsilon: 3e-4`, `epsilon_high: 4e-4` |
| CISPO (2506.13585) | `surrogate: cispo`, `aggregation: tokens` |
| SAPO (2511.20347) | `surrogate: sapo` |
| MaxRL (2602.02710) | `scale_rewards: mean` |
| REINFORCE++ with the group's mean as baseline (2501.03262) | `scale_rewards: tokens`, `aggregation: tokens` |

DAPO's dynamic sampling is `rollouts.refill`. Not covered, being more than a parameter: RLOO's KL inside the reward.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig, OnlineMethod, Scored
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.aggregation import aggregate, count, masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.policy_gradient import (
    clipped_shares,
    clipped_surrogate,
    importance_ratio,
    kl_k3,
    log_ratio,
    out_of_bounds,
    soft_overlong_penalty,
    soft_surrogate,
    truncated_importance_loss,
)
from posttrain.objectives.turns import returns_to_go, turn_advantages


class GRPOConfig(MethodConfig):
    name: Literal["grpo"] = "grpo"
    epsilon: float = Field(0.2, gt=0, description="clip range below 1 (and above, unless epsilon_high is given)")
    epsilon_high: float | None = Field(None, gt=0, description="clip range above 1; default: epsilon")
    surrogate: Literal["clip", "cispo", "sapo"] = Field(
        "clip", description="PPO's clip, a truncated detached weight, or a sigmoid of the ratio"
    )
    cispo_cap: float = Field(5.0, gt=0, description="largest importance weight, absolute; cispo only")
    sapo_tau: float = Field(1.0, gt=0, description="how fast the gradient fades where the advantage is above 0; sapo")
    sapo_tau_negative: float = Field(1.05, gt=0, description="and where it is not; sapo only")
    dual_clip: float | None = Field(None, gt=1, description="bound on the loss of tokens with negative advantage")
    ratio: Literal["token", "sequence", "trajectory"] = Field("token", description="level of the importance ratio")
    aggregation: Literal["sequences", "tokens", "constant"] = Field(
        "sequences", description="mean over rows of token means, over all tokens, or over a constant length"
    )
    baseline: Literal["mean", "leave_one_out"] = Field(
        "mean", description="what is subtracted from a reward: the mean of its group, or of the others in it"
    )
    scale_rewards: Literal["group", "batch", "none", "mean", "tokens"] = Field(
        "group",
        description="what divides advantages: the deviation of the group or the batch, nothing, the group's mean; or "
        "they are whitened over all tokens",
    )
    credit: Literal["episode", "turn"] = Field(
        "episode", description="one advantage for all of a completion, or for each turn of an episode (environment)"
    )
    turn_discount: float = Field(1.0, gt=0, le=1, description="of later rewards, per turn; credit: turn")
    beta: float = Field(0.0, ge=0, description="weight of the KL to the starting policy, in the loss")
    kl_importance: bool = Field(
        True, description="weight the k3 estimate by the ratio, which makes its gradient unbiased off-policy; beta > 0"
    )
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts (mu in the paper)")
    mask_truncated: bool = Field(False, description="no loss on completions cut at the length limit")
    overlong_cache: int | None = Field(
        None, ge=1, description="tokens before the length limit over which the reward falls by up to 1; default: off"
    )

    @model_validator(mode="after")
    def _effective(self) -> GRPOConfig:
        written = self.model_fields_set
        if self.surrogate != "clip" and written & {"epsilon", "epsilon_high", "dual_clip"}:
            instead = {"cispo": "cispo_cap", "sapo": "sapo_tau"}[self.surrogate]
            raise ValueError(
                f"epsilon, epsilon_high and dual_clip have no effect with surrogate {self.surrogate}: set {instead}"
            )
        if self.surrogate != "cispo" and "cispo_cap" in written:
            raise ValueError(
                f"cispo_cap has no effect with surrogate {self.surrogate}: set surrogate: cispo, or epsilon_high"
            )
        if self.surrogate != "sapo" and written & {"sapo_tau", "sapo_tau_negative"}:
            raise ValueError(f"sapo_tau and sapo_tau_negative have no effect with surrogate {self.surrogate}: set sapo")
        if self.credit == "episode" and "turn_discount" in written:
            raise ValueError("turn_discount has no effect with credit episode: set credit: turn")
        if self.credit == "turn":
            whole = {"overlong_cache": None, "ratio": "token"}
            wrong = next((key for key, alone in whole.items() if getattr(self, key) != alone), None)
            if wrong is not None or self.scale_rewards in ("mean", "tokens"):
                raise ValueError(f"{wrong or 'scale_rewards'} is about whole completions, and credit: turn about turns")
        if self.beta == 0 and "kl_importance" in written:
            raise ValueError("kl_importance has no effect with beta 0")
        return self


class GRPO(OnlineMethod[GRPOConfig]):
    Config: ClassVar[type[MethodConfig]] = GRPOConfig
    paper = "DeepSeekMath: Group Relative Policy Optimization, arXiv 2402.03300"

    @property
    def needs(self) -> Needs:
        return Needs(
            data=("prompts",),
            rollouts=True,
            verifier=True,
            reference=self.config.beta > 0,
            min_samples_per_prompt=2,
            turns=self.config.credit == "turn",
        )

    @property
    def updates_per_rollout(self) -> int:
        return self.config.updates_per_rollout

    @property
    def epsilon_high(self) -> float:
        return self.config.epsilon if self.config.epsilon_high is None else self.config.epsilon_high

    def advantages(self, scored: Scored) -> Tensor:
        baseline, scale, of = self.config.baseline, self.config.scale_rewards, (scored.groups, scored.known)
        if self.config.credit == "turn":
            returns = returns_to_go(scored.turn_rewards, self.config.turn_discount)
            return turn_advantages(returns, scored.turns, *of, baseline=baseline, scale=scale)
        rewards = scored.rewards
        if self.config.overlong_cache is not None:
            limits = scored.max_new_tokens if scored.limits is None else scored.limits
            rewards = rewards + soft_overlong_penalty(scored.lengths, limits, self.config.overlong_cache).to(rewards)
        return group_advantages(rewards, *of, baseline=baseline, scale=scale, lengths=scored.lengths)

    def keep(self, scored: Scored) -> Tensor:
        return scored.known & scored.finished if self.config.mask_truncated else scored.known

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": count(batch.mask, self.config.aggregation)}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        c = self.config
        ratio = importance_ratio(batch.logps, batch.old_logps, batch.mask, c.ratio)
        if c.surrogate == "clip":
            losses = clipped_surrogate(ratio, batch.advantages, c.epsilon, self.epsilon_high, c.dual_clip)
        elif c.surrogate == "sapo":
            losses = soft_surrogate(ratio, batch.advantages, c.sapo_tau, c.sapo_tau_negative)
        else:
            losses = truncated_importance_loss(batch.logps, ratio, batch.advantages, c.cispo_cap)
        diagnostics: dict[str, Tensor] = {}
        if c.beta > 0:
            kl = kl_k3(batch.logps, batch.ref_logps)
            losses = losses + c.beta * (kl * ratio if c.kl_importance else kl)
            diagnostics["kl"] = kl
        if batch.old_logps is not None:
            far = out_of_bounds(log_ratio(batch.logps, batch.old_logps, batch.mask, c.ratio))
            diagnostics |= {"ratio_mean": ratio, "approx_kl": kl_k3(batch.old_logps, batch.logps)}
            diagnostics["ratio_clamped_share"] = far
            if c.surrogate == "clip":
                low, high = clipped_shares(ratio, batch.advantages, c.epsilon, self.epsilon_high)
                diagnostics |= {"clip_share_low": low, "clip_share_high": high}
        total = aggregate(losses, batch.mask, c.aggregation, max_length=batch.max_length)
        tokens = batch.mask.sum()
        means = {k: (masked(v.detach(), batch.mask).sum(), tokens) for k, v in diagnostics.items()}
        return {"policy": LossSum(total.value, total.unit, total.count, means)}
