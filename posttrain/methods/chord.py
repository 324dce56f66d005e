"""CHORD: expert traces as a weighted term beside on-policy updates; a schedule for the whole, a weight for each token.

| variant | parameters |
| --- | --- |
| CHORD-phi | the defaults: `mu` 0.1 throughout, `phi: uncertainty` |
| CHORD-mu | `phi: none`, `mu_decay_steps: 200`, `mu_peak: 0.9`, `mu_valley: 0.05` |
| SFT-IS | `phi: probability` |
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.metric import Metric
from posttrain.lazy import Tensor, torch
from posttrain.methods.mixed import Mixed, MixedConfig
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.expert import expert_nll, expert_weight, mixing_weight


class CHORDConfig(MixedConfig):
    name: Literal["chord"] = "chord"
    mu_warmup_steps: int = Field(0, ge=0, description="W: optimizer steps from 0 up to mu_peak")
    mu_decay_steps: int = Field(0, ge=0, description="D: optimizer steps from mu_peak down to mu_valley, by a cosine")
    mu_peak: float = Field(0.1, ge=0, le=1, description="largest weight of the expert term; the policy term has 1 - mu")
    mu_valley: float = Field(0.1, ge=0, le=1, description="weight of the expert term after warm-up and decay")
    phi: Literal["uncertainty", "probability", "none"] = Field(
        "uncertainty", description="weight of an expert token: p (1 - p), p, or 1"
    )
    cutoff_prob: float = Field(1.0, gt=0, le=1, description="expert tokens likelier than this give no gradient; 1: off")
    dual_clip: float | None = Field(3.0, gt=1, description="bound on the loss of tokens with negative advantage")

    @model_validator(mode="after")
    def _effective(self) -> CHORDConfig:
        if "mu_peak" in self.model_fields_set and self.mu_warmup_steps == self.mu_decay_steps == 0:
            raise ValueError("mu_peak has no effect without mu_warmup_steps or mu_decay_steps: set mu_valley")
        return self


class CHORD(Mixed[CHORDConfig]):
    Config = CHORDConfig
    paper = "On-Policy RL Meets Off-Policy Experts: CHORD, arXiv 2508.11408"
    metrics = (Metric("chord/mu", "CHORD's weight of the expert term; the policy term has the rest.", "1"),)

    def __init__(self, config: CHORDConfig) -> None:
        super().__init__(config)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        c = self.config
        self.mu = mixing_weight(step, c.mu_warmup_steps, c.mu_decay_steps, c.mu_peak, c.mu_valley)

    @property
    def policy_weight(self) -> float:
        return 1 - self.mu

    def expert_losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor, float]:
        weights = expert_weight(batch.logps, self.config.phi)
        return expert_nll(batch.logps, weights, self.config.cutoff_prob), weights, self.mu

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        terms = super().loss(batch)
        one = torch.ones(())
        terms["expert"].diagnostics["chord/mu"] = (self.mu * one, one)
        return terms
