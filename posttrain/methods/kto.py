"""KTO: single completions labelled good or bad, against the KL of the policy from the reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig
from posttrain.methods.unpaired import UnpairedMethod
from posttrain.objectives.unpaired import kto_loss


class KTOConfig(MethodConfig):
    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="weight of the KL: how steep the value is around the reference point")
    desirable_weight: float = Field(1.0, ge=0, description="lambda_D, weight of good rows")
    undesirable_weight: float = Field(
        1.0,
        ge=0,
        description="lambda_U, weight of bad rows; with n_D good and n_U bad ones lambda_D n_D / (lambda_U n_U) within "
        "1 and 4/3 is advised",
    )


class KTO(UnpairedMethod[KTOConfig]):
    Config = KTOConfig
    scores: ClassVar[Literal["mismatched", "own"]] = "mismatched"
    paper = "KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306"

    def __init__(self, config: KTOConfig) -> None:
        super().__init__(config)
        self.kl = 0.0

    def observe(self, total: float, n: int) -> None:
        """z0 = max(0, mean log-ratio of other prompts' completions): an estimate of the KL, which is never negative."""
        self.kl = max(0.0, total / n) if n else 0.0

    @property
    def reference_point(self) -> float:
        return self.config.beta * self.kl

    def rewards(self, log_ratios: Tensor) -> Tensor:
        return self.config.beta * log_ratios

    def losses(self, log_ratios: Tensor, good: Tensor) -> Tensor:
        c = self.config
        return kto_loss(log_ratios, good, self.kl, c.beta, c.desirable_weight, c.undesirable_weight)
