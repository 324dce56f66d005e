"""REC: group-relative REINFORCE for rollouts of any age, with clip, weight, regulariser and dropping chosen apart.

| member of the family | parameters |
| --- | --- |
| REC-OneSide-NoIS, -IS | the defaults; `weight: importance` |
| REC-TwoSide-IS | `clip: two_side`, `weight: importance` |
| REC-Ring-NoIS | `clip: ring` |
| REC-GSPO-NoIS, -IS | `clip: sequence_one_side`, and `weight: sequence_importance` |
| REINFORCE | `clip: none` |
| RED-Drop | `clip: none`, `drop: balanced` |
| RED-Weight | `clip: none`, `weight: advantage` |
| AsymRE, OPMD | `regularizer: forward_kl` or `k2` with `clip: none`: the methods `asymre` and `opmd` |

RED is the paper's "regularise, reweight, drop"; Recall-Extend Dynamics, which shares the letters, is the method `red`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, OnlineMethod, Scored
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.aggregation import Aggregation, aggregate, count, masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.policy_gradient import RatioLevel, importance_ratio, kl_k3, log_ratio, out_of_bounds
from posttrain.objectives.rec import balanced_rows, rec_mask, rec_weight, token_square, weighted_reinforce


class RECConfig(MethodConfig):
    name: Literal["rec"] = "rec"
    clip: Literal["none", "one_side", "two_side", "ring", "sequence_one_side"] = Field(
        "one_side", description="which tokens lose their gradient for their ratio; sequence_one_side: GSPO's"
    )
    weight: Literal["none", "importance", "sequence_importance", "advantage"] = Field(
        "none", description="detached factor of a token: 1, its ratio, its sequence's ratio, or exp(A / temperature)"
    )
    epsilon_low: float | None = Field(None, gt=0, description="clip range below 1; default: 0.2, for sequences 3e-4")
    epsilon_high: float | None = Field(None, gt=0, description="clip range above 1; default: 0.2, for sequences 4e-4")
    epsilon_low_prime: float = Field(0.6, gt=0, description="ring: positive tokens below 1 minus this are kept")
    epsilon_high_prime: float = Field(2.0, gt=0, description="ring: negative tokens above 1 plus this are kept")
    temperature: float = Field(1.0, gt=0, description="of the weight exp(A / temperature)")
    regularizer: Literal["none", "forward_kl", "k2"] = Field(
        "none", description="on every trained token: -c l, or c (l - l_old)^2"
    )
    coefficient: float = Field(0.1, ge=0, description="c, the weight of the regularizer")
    drop: Literal["none", "balanced"] = Field(
        "none", description="balanced: no more negative rows than positive ones in a group, the surplus drawn at random"
    )
    drop_seed: int = Field(0, ge=0, description="of the rows that `drop` leaves out")
    scale_rewards: Literal["group", "batch", "none"] = Field("none", description="deviation that divides advantages")
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts")

    @model_validator(mode="after")
    def _effective(self) -> RECConfig:
        written = self.model_fields_set
        if (self.weight == "sequence_importance") > (self.clip == "sequence_one_side"):
            raise ValueError("weight sequence_importance goes with clip sequence_one_side")
        if self.clip == "sequence_one_side" and self.weight == "importance":
            raise ValueError("with clip sequence_one_side the ratio is the sequence's: weight sequence_importance")
        if self.clip == "none" and written & {"epsilon_low", "epsilon_high"}:
            raise ValueError("epsilon_low and epsilon_high have no effect with clip none")
        if self.clip != "ring" and written & {"epsilon_low_prime", "epsilon_high_prime"}:
            raise ValueError("epsilon_low_prime and epsilon_high_prime have no effect without clip ring")
        if self.weight != "advantage" and "temperature" in written:
            raise ValueError("temperature has no effect without weight advantage")
        if self.regularizer == "none" and "coefficient" in written:
            raise ValueError("coefficient has no effect without a regularizer")
        if self.drop == "none" and "drop_seed" in written:
            raise ValueError("drop_seed has no effect without drop balanced")
        return self


class REC(OnlineMethod[RECConfig]):
    Config: ClassVar[type[MethodConfig]] = RECConfig
    paper = "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm, arXiv 2509.24203"

    @property
    def needs(self) -> Needs:
        return Needs(data=("prompts",), rollouts=True, verifier=True, min_samples_per_prompt=2)

    @property
    def updates_per_rollout(self) -> int:
        return self.config.updates_per_rollout

    @property
    def linear_in_advantages(self) -> bool:
        return self.config.weight != "advantage"

    @property
    def epsilons(self) -> tuple[float, float]:
        """The clip range below and above 1."""
        low, high = (3e-4, 4e-4) if self._sequences else (0.2, 0.2)
        c = self.config
        return c.epsilon_low or low, c.epsilon_high or high

    @property
    def _sequences(self) -> bool:
        return self.config.clip == "sequence_one_side"

    @property
    def _level(self) -> RatioLevel:
        return "sequence" if self._sequences else "token"

    @property
    def _aggregation(self) -> Aggregation:
        return "sequences" if self._sequences else "tokens"

    def advantages(self, scored: Scored) -> Tensor:
        kept = scored.known
        if self.config.drop == "balanced":
            draws = np.random.default_rng([self.config.drop_seed, scored.seed]).random(len(kept))
            kept = balanced_rows(scored.rewards, scored.groups, kept, torch.from_numpy(draws))
        # Dropped rows get advantage 0, and their tokens still count.
        return group_advantages(scored.rewards, scored.groups, kept, scale=self.config.scale_rewards)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": count(batch.mask, self._aggregation)}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        c, (low, high) = self.config, self.epsilons
        ratio = importance_ratio(batch.logps, batch.old_logps, batch.mask, self._level).detach()
        kept = rec_mask(ratio, batch.advantages, c.clip, low, high, c.epsilon_low_prime, c.epsilon_high_prime)
        weights = rec_weight(ratio, batch.advantages, c.weight, c.temperature)
        losses = weighted_reinforce(batch.logps, batch.advantages, weights, kept)
        if c.regularizer == "forward_kl":
            losses = losses - c.coefficient * batch.logps
        elif c.regularizer == "k2":
            losses = losses + c.coefficient * token_square(batch.logps, batch.old_logps)
        total = aggregate(losses, batch.mask, self._aggregation)
        means = self._diagnostics(batch, ratio, kept) if batch.old_logps is not None else {}
        return {"policy": LossSum(total.value, total.unit, total.count, means)}

    def _diagnostics(self, batch: TokenBatch, ratio: Tensor, kept: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        tokens = batch.mask.sum()
        values = {
            "ratio_mean": ratio,
            "approx_kl": kl_k3(batch.old_logps, batch.logps.detach()),
            "ratio_clamped_share": out_of_bounds(log_ratio(batch.logps, batch.old_logps, batch.mask, self._level)),
            "clip_share_low": (~kept & (ratio < 1)).to(ratio.dtype),
            "clip_share_high": (~kept & (ratio > 1)).to(ratio.dtype),
        }
        return {name: (masked(value, batch.mask).sum(), tokens) for name, value in values.items()}
