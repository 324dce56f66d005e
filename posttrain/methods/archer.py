"""ArCHer: critics of whole turns learnt off-policy from recorded episodes, a policy that is trained within a turn.

| `actions` | V is fitted to Q of | the policy learns from |
| --- | --- | --- |
| drawn | actions that it draws anew in recorded states | the same actions, by policy gradient (the paper's method) |
| recorded | recorded actions, by an expectile (IQL) | recorded actions, weighted by exp(A) (offline experiments) |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.steps import StepRule
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, Metric, OfflineMethod, Regression
from posttrain.methods.companions import TargetCritic, ValueHeads
from posttrain.objectives.aggregation import count
from posttrain.objectives.archer import (
    TurnPlaces,
    actor_losses,
    baseline_errors,
    expectile_errors,
    q_targets,
    squared_errors,
    turns_of,
    utterance_advantages,
    weighted_imitation,
)
from posttrain.objectives.batch import HEAD, TARGET, LossSum, TokenBatch, Unit
from posttrain.objectives.digirl import terminal_rewards, values_after

Q, V, BASELINE = (0, 1), (2, 3), 4
"""Numbers of the critic's heads."""


class ArCHerConfig(MethodConfig):
    name: Literal["archer"] = "archer"
    turn_discount: float = Field(0.95, gt=0, le=1, description="gamma: per turn")
    target_rate: float = Field(
        0.1, gt=0, le=1, description="tau: by which the target critic follows, per optimizer step"
    )
    target: Literal["own", "smaller"] = Field(
        "own", description="V behind a turn in the target of Q: each critic's own, or the smaller of both"
    )
    actions: Literal["drawn", "recorded"] = Field(
        "drawn",
        description="what V and the policy learn from: actions drawn anew, or those of the episodes alone, as in the "
        "authors' offline experiments",
    )
    actions_per_episode: int = Field(
        2, ge=1, description="fresh actions per episode and step, each at one of its states; actions drawn"
    )
    token_baseline: bool = Field(
        False, description="a value of each token's state is taken off the advantage; actions drawn"
    )
    expectile: float = Field(0.9, gt=0, lt=1, description="of Q that V is fitted to; actions recorded")
    inverse_temperature: float = Field(
        1.0, gt=0, description="times A, the log-weight of a turn, in units of 1 / reward; actions recorded"
    )
    actor_freeze_steps: int = Field(20, ge=0, description="optimizer steps at the start that train the critic only")

    @model_validator(mode="after")
    def _effective(self) -> ArCHerConfig:
        of = {"recorded": {"actions_per_episode", "token_baseline"}, "drawn": {"expectile", "inverse_temperature"}}
        if idle := sorted(of[self.actions] & self.model_fields_set):
            raise ValueError(f"{', '.join(idle)}: no effect with actions {self.actions}")
        return self


class ArCHer(OfflineMethod[ArCHerConfig]):
    """Recorded turns train Q; V and the policy learn from fresh actions at recorded states, or from recorded turns too.

    Where actions are drawn the recorded rows are `batch.experts`, the fresh ones `batch.rollouts`, each of one turn.
    """

    Config = ArCHerConfig
    paper = "ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL, arXiv 2402.19446"
    metrics = (
        Metric("archer/q", "Mean value of recorded turns, of both critics.", "reward"),
        Metric("archer/q_solved", "The same of turns of solved episodes.", "reward"),
        Metric("archer/v", "Mean value of the states before the actions that the policy learns from.", "reward"),
        Metric("archer/advantage", "Advantage of the actions that the policy learns from.", "reward"),
        Metric("archer/advantage_size", "Absolute advantage of these actions.", "reward"),
    )

    def __init__(self, config: ArCHerConfig) -> None:
        super().__init__(config)
        self.frozen = config.actor_freeze_steps > 0

    @property
    def needs(self) -> Needs:
        c = self.config
        return Needs(
            data=("traces",),
            samples=c.actions_per_episode if c.actions == "drawn" else 0,
            critic=True,
            critic_first=c.actor_freeze_steps,
            companions=(TargetCritic(c.target_rate), ValueHeads(5 if c.token_baseline else 4)),
        )

    @property
    def steps(self) -> StepRule:
        return StepRule(None, turns=True)

    def begin_step(self, step: int) -> None:
        self.frozen = step < self.config.actor_freeze_steps

    def regression(self, batch: TokenBatch) -> Regression:
        """Q of the first critic, of the recorded turns, and its target."""
        recorded = self._recorded(batch)
        turns = turns_of(recorded.mask, recorded.steps)
        values = turns.at_end(recorded.further[f"{HEAD}{Q[0]}"]).detach()
        return Regression(values, self._targets(recorded, turns)[0], turns.exists)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        recorded = self._recorded(batch)
        n = turns_of(recorded.mask, recorded.steps).exists.sum()
        if self.config.actions == "recorded":
            return {"q": n, "value": n, "policy": n}
        fresh = count(batch.rollouts.mask, "sequences")
        counts = {"expert": n, "value": fresh, "policy": fresh}
        return counts | ({"baseline": batch.rollouts.mask.sum()} if self.config.token_baseline else {})

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        recorded = self._recorded(batch)
        if self.config.actions == "recorded":
            return {"q": self._of_q(recorded), **self._of_turns(recorded)}
        return {"expert": self._of_q(recorded), **self._of_fresh(batch.rollouts)}

    def _recorded(self, batch: TokenBatch) -> TokenBatch:
        return batch if self.config.actions == "recorded" else batch.experts

    def _of_q(self, batch: TokenBatch) -> LossSum:
        turns = turns_of(batch.mask, batch.steps)
        n = turns.exists.sum()
        values = [turns.at_end(batch.further[f"{HEAD}{head}"]) for head in Q]
        pairs = zip(values, self._targets(batch, turns), strict=True)
        errors = torch.stack([squared_errors(value, target, turns.exists) for value, target in pairs]).sum()
        mean = torch.stack(values).detach().mean(dim=0)
        assert batch.rewards is not None  # traces have outcomes
        solved = turns.exists & (batch.rewards > 0.5).unsqueeze(1)
        seen = {
            "critic/loss": (errors.detach(), n),
            "archer/q": (mean.sum(), n),
            "archer/q_solved": ((mean * solved).sum(), solved.sum()),
        }
        return LossSum(errors, "steps", n, seen)

    def _targets(self, batch: TokenBatch, turns: TurnPlaces) -> list[Tensor]:
        """(B, S) what Q of each critic is fitted to: the reward is the outcome, at the last turn."""
        rewards = terminal_rewards(batch.rewards, turns.exists)
        later = [values_after(turns.before(batch.further[f"{TARGET}{head}"]), turns.exists) for head in V]
        if self.config.target == "smaller":
            later = [torch.minimum(*later)] * len(later)
        return [q_targets(rewards, after, self.config.turn_discount) for after in later]

    def _of_turns(self, batch: TokenBatch) -> dict[str, LossSum]:
        """V and the policy, of the recorded turns."""
        c, turns = self.config, turns_of(batch.mask, batch.steps)
        n = turns.exists.sum()
        q = [turns.at_end(batch.further[f"{HEAD}{head}"]) for head in Q]
        v = [turns.before(batch.further[f"{HEAD}{head}"]) for head in V]
        aims = [turns.at_end(batch.further[f"{TARGET}{head}"]) for head in Q]
        errors = [expectile_errors(value, aim, turns.exists, c.expectile) for value, aim in zip(v, aims, strict=True)]
        advantages = utterance_advantages((q[0], q[1]), (v[0], v[1]))
        logps = turns.sums(batch.logps, batch.mask, batch.steps)
        losses = weighted_imitation(logps, advantages, turns.exists, c.inverse_temperature)
        return {
            "value": LossSum(torch.stack(errors).sum(), "steps", n),
            "policy": self._policy(losses.sum(), "steps", n, v, advantages),
        }

    def _policy(self, losses: Tensor, unit: Unit, n: Tensor, v: Sequence[Tensor], advantages: Tensor) -> LossSum:
        """Of the actions that the policy learns from, with what is logged of these."""
        seen = {
            "archer/v": (torch.stack(list(v)).detach().mean(dim=0).sum(), n),
            "archer/advantage": (advantages.sum(), n),
            "archer/advantage_size": (advantages.abs().sum(), n),
        }
        # The shell drops the policy's gradients, where they are not sharded.
        return LossSum((0.0 if self.frozen else 1.0) * losses, unit, n, seen)

    def _of_fresh(self, batch: TokenBatch) -> dict[str, LossSum]:
        n, turns = count(batch.mask, "sequences"), turns_of(batch.mask, torch.zeros_like(batch.mask, dtype=torch.long))
        own, target = ({head: batch.further[f"{name}{head}"] for head in (*Q, *V)} for name in (HEAD, TARGET))
        v = (turns.before(own[V[0]]), turns.before(own[V[1]]))
        # An action that is cut ends its episode, which is not solved; no trace holds one that critics could learn from.
        assert batch.rewards is not None  # whether they were
        ended = batch.rewards.unsqueeze(1)
        q = (turns.at_end(own[Q[0]]) * ended, turns.at_end(own[Q[1]]) * ended)
        aims = [turns.at_end(target[head]) * ended for head in Q]
        errors = torch.stack([squared_errors(*pair, turns.exists) for pair in zip(v, aims, strict=True)]).sum()
        advantages = utterance_advantages(q, v)
        baseline = batch.further[f"{HEAD}{BASELINE}"] if self.config.token_baseline else None
        losses = actor_losses(batch.logps, advantages[:, 0], batch.mask, baseline)
        terms = {
            "value": LossSum(errors, "sequences", n),
            "policy": self._policy(losses.sum(), "sequences", n, v, advantages),
        }
        if baseline is not None:
            apart = baseline_errors(baseline, advantages[:, 0], batch.mask)
            terms["baseline"] = LossSum(apart.sum(), "tokens", batch.mask.sum())
        return terms
