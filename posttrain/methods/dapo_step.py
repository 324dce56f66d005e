"""Step-level DAPO: a critic trained first and apart, then a policy regressed on the advantages of steps.

Two runs on the same traces: `phase: critic` trains the value model and leaves the policy as it is; `phase: policy`
takes that value model as `critic.path`, frozen. The paper draws several next steps at each state and centres their
values; here the steps are those of the traces and the baseline is V of the state, which has the same expectation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.steps import StepRule
from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig, Metric, OfflineMethod, Regression
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.oreo import Steps, by_step
from posttrain.objectives.step_dapo import advantage_regression, critic_losses, step_advantages


class DAPOStepConfig(MethodConfig):
    name: Literal["dapo_step"] = "dapo_step"
    phase: Literal["critic", "policy"] = Field("policy", description="what this run trains; the critic comes first")
    delimiter: str | None = Field(
        "\n", min_length=1, description="text that ends a step; null: the traces' own `step_ends`"
    )
    beta: float = Field(0.01, gt=0, description="temperature: the log-ratio of a step is regressed on A / beta; policy")
    min_advantage: float = Field(
        0.0, ge=0, description="steps with a smaller advantage, either way, are left out of the loss; policy"
    )

    @model_validator(mode="after")
    def _effective(self) -> DAPOStepConfig:
        idle = sorted({"beta", "min_advantage"} & self.model_fields_set) if self.phase == "critic" else []
        if idle:
            raise ValueError(f"{', '.join(idle)}: no effect with phase critic")
        return self


class DAPOStep(OfflineMethod[DAPOStepConfig]):
    Config = DAPOStepConfig
    paper = (
        "Improving Multi-Step Reasoning Abilities of LLMs with Direct Advantage Policy Optimization, arXiv 2412.18279"
    )
    metrics = (
        Metric("dapo_step/advantage", "Mean size of the advantage of a step.", "reward"),
        Metric("dapo_step/kept_share", "Share of steps with an advantage that is large enough to train on.", "share"),
        Metric("dapo_step/log_ratio", "Log-ratio of policy to reference per step.", "nats per step"),
    )

    @property
    def needs(self) -> Needs:
        policy = self.config.phase == "policy"
        return Needs(data=("traces",), reference=policy, critic=True, trains="policy" if policy else "critic")

    @property
    def steps(self) -> StepRule:
        return StepRule(self.config.delimiter)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        last = (batch.mask * (batch.steps + 1)).amax(dim=1)  # steps have no gap
        return {"value" if self.config.phase == "critic" else "policy": last.sum()}

    def regression(self, batch: TokenBatch) -> Regression | None:
        """The probability that a trace ends right, of every state, and whether it did."""
        if self.config.phase == "policy":
            return None
        steps = self._by_step(batch)
        outcomes = batch.rewards.unsqueeze(1).expand_as(steps.values)
        return Regression(steps.values.detach().sigmoid(), outcomes, steps.exists)

    def _by_step(self, batch: TokenBatch) -> Steps:
        reference = batch.logps.detach() if batch.ref_logps is None else batch.ref_logps
        return by_step(batch.logps, reference, batch.values, batch.mask, batch.steps)

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        (n,) = self.counts(batch).values()
        steps = self._by_step(batch)
        return self._critic(steps, batch, n) if self.config.phase == "critic" else self._policy(steps, batch, n)

    def _critic(self, steps: Steps, batch: TokenBatch, n: Tensor) -> dict[str, LossSum]:
        losses = critic_losses(steps, batch.rewards)
        right = ((steps.values.detach() > 0) == (batch.rewards > 0.5).unsqueeze(1)) & steps.exists
        seen = {"critic/loss": (losses.detach().sum(), n), "critic/accuracy": (right.sum().to(n), n)}
        return {"value": LossSum(losses.sum(), "steps", n, seen)}

    def _policy(self, steps: Steps, batch: TokenBatch, n: Tensor) -> dict[str, LossSum]:
        advantages = step_advantages(steps, batch.rewards)
        kept = steps.exists & (advantages.abs() >= self.config.min_advantage)
        losses = advantage_regression(steps.ratios, advantages, self.config.beta) * kept
        ratios = (steps.ratios.detach() * steps.exists).sum()
        seen = {
            "dapo_step/advantage": (advantages.abs().sum(), n),
            "dapo_step/kept_share": (kept.sum().to(n), n),
            "dapo_step/log_ratio": (ratios, n),
        }
        return {"policy": LossSum(losses.sum(), "steps", n, seen)}
