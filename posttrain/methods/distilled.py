"""What methods share in which a teacher grades the policy's own samples: the forms of the loss on them."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import Field, model_validator

from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, OnlineMethod, Scored
from posttrain.methods.companions import DIVERGENCE, SCORER_LOGPS, Divergence
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.aggregation import aggregate, masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.distillation import teacher_advantages
from posttrain.objectives.next_token import generalised_jsd, on_support
from posttrain.objectives.policy_gradient import (
    clipped_shares,
    clipped_surrogate,
    importance_ratio,
    kl_k3,
    log_ratio,
    out_of_bounds,
    per_token,
)


class DistilledConfig(MethodConfig):
    objective: Literal["policy_gradient", "full", "top_k"] = Field(
        "policy_gradient", description="log-ratio on the sampled token, or a divergence over the vocabulary or a part"
    )
    coef: float = Field(1.0, gt=0, description="kappa: weight of the teacher's term")
    discount: float = Field(
        0.0, ge=0, le=1, description="of later tokens' log-ratios; 1: reverse KL of the completion; policy_gradient"
    )
    epsilon: float | None = Field(None, gt=0, description="clip range of the ratio around 1; null: no clip")
    beta: float = Field(
        1.0, ge=0, le=1, description="of the generalised JSD: 1 reverse KL, 0 forward KL; objectives full and top_k"
    )
    top_k: int = Field(64, ge=1, description="tokens that the divergence looks at one by one; objective top_k")
    support: Literal["teacher", "policy"] = Field("teacher", description="whose likeliest tokens; objective top_k")
    tail: bool = Field(True, description="all others are one outcome; false: renormalised without them; top_k")
    outcome_coef: float = Field(
        0.0, ge=0, description="weight of the verifier's reward less its group's mean, on the same tokens"
    )
    aggregation: Literal["sequences", "tokens"] = Field("tokens", description="mean over all tokens, or over rows")
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts")

    @model_validator(mode="after")
    def _of_the_objective(self) -> DistilledConfig:
        written, samples = self.model_fields_set, self.objective == "policy_gradient"
        for name in ("beta",) if samples else ("discount",):
            if name in written:
                wanted = "full or top_k" if samples else "policy_gradient"
                raise ValueError(f"{name} has no effect with objective {self.objective}: set objective: {wanted}")
        for name in ("top_k", "support", "tail"):
            if name in written and self.objective != "top_k":
                raise ValueError(f"{name} has no effect with objective {self.objective}: set objective: top_k")
        if "epsilon" in written and not samples and not self.outcome_coef:
            raise ValueError(f"epsilon has no effect with objective {self.objective} and outcome_coef 0: no ratio")
        return self


C = TypeVar("C", bound=DistilledConfig)


class Distilled(OnlineMethod[C]):
    """`SCORER_LOGPS` are the teacher's for the form on sampled tokens, `DIVERGENCE` is for the others."""

    @property
    def linear_in_advantages(self) -> bool:
        return False  # the teacher's part is formed in the loss

    @property
    def updates_per_rollout(self) -> int:
        return self.config.updates_per_rollout

    @property
    def compared(self) -> tuple[Divergence, ...]:
        """What the form reads beside the teacher's log-probs, for `needs.companions`."""
        return () if self.config.objective == "policy_gradient" else (Divergence(self._divergence),)

    def _divergence(self, logps: Tensor, teacher_logps: Tensor) -> Tensor:
        c = self.config
        if c.objective == "top_k":
            logps, teacher_logps = on_support(logps, teacher_logps, c.top_k, c.support, tail=c.tail)
        return generalised_jsd(logps, teacher_logps, c.beta)

    def advantages(self, scored: Scored) -> Tensor:
        """The outcome's part; the teacher's is per token, and formed in the loss."""
        if self.config.outcome_coef == 0:
            return torch.zeros_like(scored.rewards)
        return self.config.outcome_coef * group_advantages(scored.rewards, scored.groups, scored.known, scale="none")

    def on_samples(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of the policy's own tokens (B, T), and what is logged; `batch.advantages` are the outcome's."""
        c, samples = self.config, self.config.objective == "policy_gradient"
        advantages = per_token(batch.advantages, batch.logps)
        if samples:
            old = batch.logps.detach() if batch.old_logps is None else batch.old_logps
            teacher = batch.further[SCORER_LOGPS]
            advantages = advantages + c.coef * teacher_advantages(old, teacher, batch.mask, c.discount)
            seen = {"teacher/kl": kl_k3(batch.logps, teacher), "teacher/logp": teacher}
        else:
            seen = {"teacher/divergence": batch.further[DIVERGENCE]}
        if not samples and c.outcome_coef == 0:
            return c.coef * batch.further[DIVERGENCE], seen
        losses, of_ratio = self._surrogate(batch, advantages)
        return losses if samples else losses + c.coef * batch.further[DIVERGENCE], seen | of_ratio

    def _surrogate(self, batch: TokenBatch, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        epsilon = self.config.epsilon
        ratio = importance_ratio(batch.logps, batch.old_logps, batch.mask)
        seen: dict[str, Tensor] = {}
        if batch.old_logps is not None:
            far = out_of_bounds(log_ratio(batch.logps, batch.old_logps, batch.mask))
            seen = {"ratio_mean": ratio, "approx_kl": kl_k3(batch.old_logps, batch.logps), "ratio_clamped_share": far}
        if epsilon is None:
            return -advantages * ratio, seen
        if batch.old_logps is not None:
            low, high = clipped_shares(ratio, advantages, epsilon, epsilon)
            seen |= {"clip_share_low": low, "clip_share_high": high}
        return clipped_surrogate(ratio, advantages, epsilon, epsilon), seen

    def term(self, losses: Tensor, seen: dict[str, Tensor], mask: Tensor) -> LossSum:
        """A sum of losses with the means of what is logged over the same tokens."""
        total, tokens = aggregate(losses, mask, self.config.aggregation), mask.sum()
        means = {name: (masked(values.detach(), mask).sum(), tokens) for name, values in seen.items()}
        return LossSum(total.value, total.unit, total.count, means)
