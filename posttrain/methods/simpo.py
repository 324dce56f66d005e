"""SimPO: the mean log-prob of a response as its reward, a target margin, no reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.preference import simpo_loss
from posttrain.objectives.sequences import mean_logps

DEFAULT_RATIO = 0.25


class SimPOConfig(MethodConfig):
    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="scale of the mean log-prob; authors' config class; they use 2 to 10")
    gamma: float | None = Field(None, ge=0, description="target margin itself; or give gamma_beta_ratio")
    gamma_beta_ratio: float | None = Field(
        None, ge=0, description="target margin over beta; default: 0.25 (authors' config class; they search 0 to 1)"
    )
    loss: Literal["sigmoid", "hinge"] = Field("sigmoid", description="function of the margin")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="probability that a label is wrong; sigmoid only")
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the token-mean negative log-likelihood of chosen; above 0 is CPO-SimPO"
    )

    @model_validator(mode="after")
    def _effective(self) -> SimPOConfig:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("give gamma or gamma_beta_ratio, not both: gamma is beta times gamma_beta_ratio")
        if self.loss == "hinge" and "label_smoothing" in self.model_fields_set:
            raise ValueError("label_smoothing has no effect with loss hinge")
        return self


class SimPO(PairMethod[SimPOConfig]):
    Config = SimPOConfig
    paper = "SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv 2405.14734"

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",))

    @property
    def gamma(self) -> float:
        """The target margin itself."""
        c = self.config
        if c.gamma is not None:
            return c.gamma
        return c.beta * (DEFAULT_RATIO if c.gamma_beta_ratio is None else c.gamma_beta_ratio)

    @property
    def likelihood(self) -> tuple[str, float]:
        return "chosen", self.config.sft_weight

    def compare(self, rows: PreferenceBatch) -> Compared:
        c = self.config
        means = [mean_logps(rows.responses[role]) for role in ("chosen", "rejected")]
        losses = simpo_loss(means[0], means[1], c.beta, self.gamma, c.label_smoothing, c.loss)
        rewards = (c.beta * means[0], c.beta * means[1])
        logits = rewards[0] - rewards[1] - self.gamma if c.loss == "sigmoid" and not c.label_smoothing else None
        return Compared(losses, rewards, logits)
