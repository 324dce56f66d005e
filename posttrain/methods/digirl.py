"""DigiRL on recorded episodes: imitate the turns that a critic finds to have helped, on tasks that are not yet easy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.steps import StepRule
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, Metric, OfflineMethod, Regression
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.digirl import (
    both_state_losses,
    code_gates,
    imitation_losses,
    recalled_advantages,
    recalled_gates,
    terminal_rewards,
    values_after,
)
from posttrain.objectives.oreo import Steps, by_step
from posttrain.objectives.turns import returns_to_go


class DigiRLConfig(MethodConfig):
    name: Literal["digirl"] = "digirl"
    rule: Literal["code", "recalled"] = Field(
        "code",
        description="which turns are imitated: by the authors' code, or the paper as it is remembered",
    )
    margin: float = Field(0.05, description="by which V must rise over a turn that nothing else speaks for; rule code")
    return_discount: float = Field(0.5, gt=0, le=1, description="of the Monte Carlo return, per turn; rule code")
    lam: float = Field(0.5, gt=0, le=1, description="weight of the outcome, per turn before the end; rule recalled")
    instruction_margin: float | None = Field(
        None,
        ge=-1,
        lt=1,
        description="curriculum: imitate only episodes whose outcome exceeds V of the prompt by more; null: all",
    )
    curriculum_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="curriculum: the margin follows the episodes, so that this share of them is imitated (0.1 in the "
        "code, online)",
    )
    curriculum_rate: float = Field(0.1, gt=0, description="by which it follows; with curriculum_share")
    actor_freeze_steps: int = Field(20, ge=0, description="optimizer steps at the start that train the critic only")

    @model_validator(mode="after")
    def _effective(self) -> DigiRLConfig:
        of = {"code": {"lam"}, "recalled": {"margin", "return_discount"}}[self.rule]
        if idle := sorted(of & self.model_fields_set):
            raise ValueError(f"{', '.join(idle)}: no effect with rule {self.rule}")
        if self.curriculum_share is None and "curriculum_rate" in self.model_fields_set:
            raise ValueError("curriculum_rate has no effect without curriculum_share")
        return self


class DigiRL(OfflineMethod[DigiRLConfig]):
    Config = DigiRLConfig
    paper = "DigiRL: Training In-The-Wild Device-Control Agents with Autonomous RL, arXiv 2406.11896"
    metrics = (
        Metric("digirl/gate", "Share of turns that are imitated.", "share"),
        Metric("digirl/gate_solved", "Share of the turns of solved episodes that are imitated.", "share"),
        Metric("digirl/curriculum", "Share of episodes that the curriculum takes.", "share"),
        Metric("digirl/margin", "By how much their outcome exceeds V of the prompt at least.", "probability"),
        Metric("digirl/nll", "Negative log-prob of the turns of the step's episodes.", "nats per turn"),
    )

    def __init__(self, config: DigiRLConfig) -> None:
        super().__init__(config)
        self.frozen = config.actor_freeze_steps > 0
        self.margin = config.instruction_margin
        if self.margin is None and config.curriculum_share is not None:
            self.margin = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(data=("traces",), critic=True, critic_first=self.config.actor_freeze_steps)

    @property
    def steps(self) -> StepRule:
        return StepRule(None, turns=True)

    def begin_step(self, step: int) -> None:
        self.frozen = step < self.config.actor_freeze_steps

    def regression(self, batch: TokenBatch) -> Regression:
        """The probability that an episode is solved, of the state before every turn, and whether it was."""
        turns = self._turns(batch)
        outcomes = batch.rewards.unsqueeze(1).expand_as(turns.values)
        return Regression(turns.values.detach().sigmoid(), outcomes, turns.exists)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        n = (batch.mask * (batch.steps + 1)).amax(dim=1).sum()  # turns have no gap
        return {"value": n, "policy": n}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        n, turns = self.counts(batch)["policy"], self._turns(batch)
        value, taken = both_state_losses(turns, batch.rewards), self._taken(turns, batch.rewards)
        gates = self._gates(turns, batch.rewards) & taken.unsqueeze(1)
        policy = imitation_losses(turns.ratios, gates)
        weight = 0.0 if self.frozen else 1.0  # the shell drops the policy's gradients, where they are not sharded
        solved = turns.exists & (batch.rewards > 0.5).unsqueeze(1)
        right = ((turns.values.detach() > 0) == (batch.rewards > 0.5).unsqueeze(1)) & turns.exists
        of_value = {"critic/loss": (value.detach().sum(), n), "critic/accuracy": (right.sum().to(n), n)}
        episodes = turns.exists[:, 0].sum()
        of_policy = {
            "digirl/curriculum": ((taken & turns.exists[:, 0]).sum().to(n), episodes),
            "digirl/margin": ((-1.0 if self.margin is None else self.margin) * episodes, episodes),
            "digirl/gate": (gates.sum().to(n), n),
            "digirl/gate_solved": ((gates & solved).sum().to(n), solved.sum().to(n)),
            "digirl/nll": (-(turns.ratios.detach() * turns.exists).sum(), n),
        }
        return {
            "value": LossSum(value.sum(), "steps", n, of_value),
            "policy": LossSum(weight * policy.sum(), "steps", n, of_policy),
        }

    def _turns(self, batch: TokenBatch) -> Steps:
        """With the log-probs of whole turns as `ratios`."""
        return by_step(batch.logps, torch.zeros_like(batch.logps), batch.values, batch.mask, batch.steps)

    def _gates(self, turns: Steps, outcomes: Tensor) -> Tensor:
        """bool (B, S): the turns to imitate."""
        c, exists = self.config, turns.exists
        values = turns.values.detach().sigmoid()
        after, rewards = values_after(values, exists), terminal_rewards(outcomes, exists)
        if c.rule == "code":
            gates = code_gates(values, after, rewards, returns_to_go(rewards, c.return_discount), c.margin)
        else:
            gates = recalled_gates(recalled_advantages(values, after, rewards, exists, c.lam), exists)
        return gates & exists

    def _taken(self, turns: Steps, outcomes: Tensor) -> Tensor:
        """bool (B,): the episodes that the curriculum takes."""
        if self.margin is None:
            return torch.ones_like(outcomes, dtype=torch.bool)
        return outcomes - turns.values.detach()[:, 0].sigmoid() > self.margin

    def end_step(self, diagnostics: Mapping[str, float]) -> None:
        """A quantile, followed from step to step: so it does not depend on which episodes share a micro-batch."""
        c = self.config
        if c.curriculum_share is not None and "digirl/curriculum" in diagnostics:
            margin = self.margin + c.curriculum_rate * (diagnostics["digirl/curriculum"] - c.curriculum_share)
            self.margin = min(max(margin, -1.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.config.curriculum_share is None else {"margin": self.margin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.config.curriculum_share is None:
            super().load_state_dict(state)
        else:
            self.margin = state["margin"]
