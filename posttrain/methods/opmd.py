"""OPMD: online policy mirror descent with a squared log-ratio, for rollouts of any age.

Three things go by the name. `divergence: sequence` is Kimi k1.5's (arXiv 2501.12599, eq. 3): both the log-prob that is
raised and the log-ratio that is squared are those of whole completions, so that at its optimum the log-ratio of a
completion is A / tau, however long it is. `divergence: token` averages both over tokens, as Trinity-RFT does.
`divergence: none` is the same library's older form: REINFORCE divided by 1 + tau.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, OnlineMethod, Scored
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.aggregation import aggregate, count
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.policy_gradient import per_token
from posttrain.objectives.rec import log_mean_exp_baseline, mirror_descent, token_square


class OPMDConfig(MethodConfig):
    name: Literal["opmd"] = "opmd"
    divergence: Literal["token", "sequence", "none"] = Field(
        "token", description="what is squared; none divides the loss by 1 + tau instead"
    )
    tau: float | None = Field(
        None,
        gt=0,
        description="sequence: a completion's log-ratio is drawn to A / tau nats; token: weight of the square; none: "
        "the tau of 1 + tau. Default: 0.1, with none 1",
    )
    baseline: Literal["mean", "log_mean_exp"] = Field(
        "mean", description="the group's mean, or temperature * log mean exp(r / temperature)"
    )
    temperature: float = Field(1.0, gt=0, description="of the baseline log_mean_exp")
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts")

    @model_validator(mode="after")
    def _effective(self) -> OPMDConfig:
        if self.baseline == "mean" and "temperature" in self.model_fields_set:
            raise ValueError("temperature has no effect with baseline mean")
        return self


class OPMD(OnlineMethod[OPMDConfig]):
    Config = OPMDConfig
    paper = "Kimi k1.5, arXiv 2501.12599; token form: arXiv 2509.24203"

    @property
    def needs(self) -> Needs:
        return Needs(data=("prompts",), rollouts=True, verifier=True, min_samples_per_prompt=2)

    @property
    def updates_per_rollout(self) -> int:
        return self.config.updates_per_rollout

    @property
    def tau(self) -> float:
        """The temperature, as the chosen form has it."""
        return self.config.tau or (1.0 if self.config.divergence == "none" else 0.1)

    def advantages(self, scored: Scored) -> Tensor:
        rows = scored.rewards, scored.groups, scored.known
        if self.config.baseline == "mean":
            return group_advantages(*rows, scale="none")
        values = log_mean_exp_baseline(*rows, self.config.temperature)
        return torch.where(scored.known, scored.rewards - values, torch.zeros_like(values))

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": count(batch.mask, "sequences" if self.config.divergence == "sequence" else "tokens")}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        if self.config.divergence == "sequence":
            losses = mirror_descent(batch.logps, batch.old_logps, batch.advantages, batch.mask, self.tau)
            return {"policy": LossSum(losses.sum(), "sequences", self.counts(batch)["policy"])}
        losses = -per_token(batch.advantages, batch.logps) * batch.logps
        if self.config.divergence == "token":
            losses = losses + self.tau * token_square(batch.logps, batch.old_logps)
        else:
            losses = losses / (1 + self.tau)
        return {"policy": aggregate(losses, batch.mask, "tokens")}
