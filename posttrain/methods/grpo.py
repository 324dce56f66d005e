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
| Clip-Cov (2505.22617) | `clip_cov: 2e-4` |
| entropy bonus | `terms: {outcome: {}, entropy: {weight: 0.001}}` |

DAPO's dynamic sampling is `rollouts.refill`. Not covered, being more than a parameter: RLOO's KL inside the reward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.metric import Metric
from posttrain.config.needs import Needs
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, OnlineMethod, Scored
from posttrain.methods.companions import DROPPED, CovariantTokens
from posttrain.methods.terms import Surrogate, Terms, TermsConfig
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
    clip_cov: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of tokens without a gradient, drawn among those with a large covariance of log-prob and "
        "advantage, which lower the entropy most; default: off",
    )
    clip_cov_low: float = Field(1.0, ge=0, description="least such covariance, in nats times advantages; clip_cov")
    clip_cov_high: float = Field(5.0, gt=0, description="and largest; clip_cov")
    terms: TermsConfig | None = Field(
        None, description="signals that the advantage is the weighted sum of (docs/terms.md); default: the outcome"
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

    @model_validator(mode="after")
    def _of_covariances(self) -> GRPOConfig:
        if self.clip_cov is None and self.model_fields_set & {"clip_cov_low", "clip_cov_high"}:
            raise ValueError("clip_cov_low and clip_cov_high have no effect without clip_cov")
        if self.clip_cov is not None and self.clip_cov_low >= self.clip_cov_high:
            raise ValueError(f"clip_cov_low {self.clip_cov_low} is not below clip_cov_high {self.clip_cov_high}")
        if self.clip_cov is not None and self.terms is not None:
            raise ValueError("clip_cov is about the advantage of the outcome: remove it, or terms")
        return self

    @model_validator(mode="after")
    def _of_terms(self) -> GRPOConfig:
        terms, of_groups = self.terms, {"baseline", "scale_rewards", "credit", "overlong_cache"}
        if terms is not None and not terms.compares and (idle := sorted(of_groups & self.model_fields_set)):
            raise ValueError(f"{idle[0]} has no effect where no term compares rewards: add terms.outcome")
        if terms is not None and terms.shaping is not None and self.credit == "turn":
            raise ValueError("terms.shaping is about whole completions, and credit: turn about turns")
        return self


class GRPO(OnlineMethod[GRPOConfig]):
    Config: ClassVar[type[MethodConfig]] = GRPOConfig
    paper = "DeepSeekMath: Group Relative Policy Optimization, arXiv 2402.03300"
    metrics = (Metric("clip_cov/dropped", "Share of tokens without a gradient by `clip_cov`.", "share"),)

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        self.terms = None if config.terms is None else Terms(config.terms, self.shaping)

    @property
    def needs(self) -> Needs:
        own, c = self.config.terms, self.config
        of_tokens = () if c.clip_cov is None else (CovariantTokens(c.clip_cov, c.clip_cov_low, c.clip_cov_high),)
        return Needs(
            data=("prompts",),
            rollouts=True,
            verifier=own is None or own.judged,
            reference=self.config.beta > 0,
            min_samples_per_prompt=2 if own is None or own.compares else 1,
            turns=self.config.credit == "turn",
            old_logps=c.clip_cov is not None,
            companions=of_tokens if self.terms is None else self.terms.companions,
        )

    @property
    def linear_in_advantages(self) -> bool:
        return self.terms is None  # signals beside the outcome are formed in the loss

    def begin_step(self, step: int) -> None:
        if self.terms is not None:
            self.terms.step = step

    @property
    def updates_per_rollout(self) -> int:
        return self.config.updates_per_rollout

    @property
    def epsilon_high(self) -> float:
        return self.config.epsilon if self.config.epsilon_high is None else self.config.epsilon_high

    def advantages(self, scored: Scored) -> Tensor:
        """Of the outcome; 0 where nothing is compared."""
        c = self.config
        if c.terms is not None and c.terms.outcome is None:
            return torch.zeros_like(scored.rewards)
        of = (scored.groups, scored.known)
        if c.credit == "turn":
            returns = returns_to_go(scored.turn_rewards, c.turn_discount)
            return turn_advantages(returns, scored.turns, *of, baseline=c.baseline, scale=c.scale_rewards)
        rewards = scored.rewards if c.terms is None or c.terms.shaping is None else scored.outcomes
        if c.overlong_cache is not None:
            limits = scored.max_new_tokens if scored.limits is None else scored.limits
            rewards = rewards + soft_overlong_penalty(scored.lengths, limits, c.overlong_cache).to(rewards)
        return self._compared(replace(scored, rewards=rewards))

    def shaping(self, scored: Scored) -> Tensor:
        """(N,) advantages of what shaping verifiers add to the outcome."""
        return self._compared(replace(scored, rewards=scored.rewards - scored.outcomes))

    def _compared(self, scored: Scored) -> Tensor:
        how: dict[str, Any] = {"baseline": self.config.baseline, "scale": self.config.scale_rewards}
        return group_advantages(scored.rewards, scored.groups, scored.known, **how, lengths=scored.lengths)

    def keep(self, scored: Scored) -> Tensor:
        judged = scored.known if self.needs.verifier else torch.ones_like(scored.known)
        return judged & scored.finished if self.config.mask_truncated else judged

    def _masks(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Tokens of each term of the loss: the surrogates, and the KL where it stands beside several."""
        if self.terms is None:
            return {"policy": batch.mask}
        masks = self.terms.masks(batch)
        return masks | ({"kl": batch.mask} if self.config.beta > 0 and "policy" not in masks else {})

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {name: count(mask, self.config.aggregation) for name, mask in self._masks(batch).items()}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        ratio = importance_ratio(batch.logps, batch.old_logps, batch.mask, self.config.ratio)
        alone = Surrogate(1.0, batch.advantages, batch.mask, {})
        parts = {"policy": alone} if self.terms is None else self.terms.parts(batch)
        found = {}
        for name, mask in self._masks(batch).items():
            losses, seen = torch.zeros_like(batch.logps), dict[str, Tensor]()
            sums = {}
            if name in parts:
                losses, seen = self._surrogate(batch, ratio, parts[name].advantages)
                losses, sums = parts[name].weight * losses, parts[name].seen
            if name in ("policy", "kl") and self.config.beta > 0:
                kl = kl_k3(batch.logps, batch.ref_logps)
                losses = losses + self.config.beta * (kl * ratio if self.config.kl_importance else kl)
                seen["kl"] = kl
            total, tokens = aggregate(losses, mask, self.config.aggregation, max_length=batch.max_length), mask.sum()
            means = {key: (masked(values.detach(), mask).sum(), tokens) for key, values in seen.items()}
            found[name] = LossSum(total.value, total.unit, total.count, means | sums)
        return found

    def _surrogate(self, batch: TokenBatch, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of tokens (B, T), and what is logged of them."""
        c = self.config
        if c.surrogate == "clip":
            losses = clipped_surrogate(ratio, advantages, c.epsilon, self.epsilon_high, c.dual_clip)
        elif c.surrogate == "sapo":
            losses = soft_surrogate(ratio, advantages, c.sapo_tau, c.sapo_tau_negative)
        else:
            losses = truncated_importance_loss(batch.logps, ratio, advantages, c.cispo_cap)
        if c.clip_cov is not None:  # counted as ever
            losses = torch.where(batch.further[DROPPED] > 0.5, torch.zeros_like(losses), losses)
        if batch.old_logps is None:
            return losses, {}
        far = out_of_bounds(log_ratio(batch.logps, batch.old_logps, batch.mask, c.ratio))
        seen = {"ratio_mean": ratio, "approx_kl": kl_k3(batch.old_logps, batch.logps), "ratio_clamped_share": far}
        if c.clip_cov is not None:
            seen["clip_cov/dropped"] = (batch.further[DROPPED] > 0.5).to(ratio)
        if c.surrogate == "clip":
            low, high = clipped_shares(ratio, advantages, c.epsilon, self.epsilon_high)
            seen |= {"clip_share_low": low, "clip_share_high": high}
        return losses, seen
