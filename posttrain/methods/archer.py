"""ArCHer: critics of whole turns learnt off-policy from recorded episodes, a policy that is trained within a turn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
    q_targets,
    squared_errors,
    turns_of,
    utterance_advantages,
)
from posttrain.objectives.batch import HEAD, TARGET, LossSum, TokenBatch
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
    actions_per_episode: int = Field(
        2, ge=1, description="fresh actions per episode and step, each at one of its states"
    )
    token_baseline: bool = Field(False, description="a value of each token's state is taken off the advantage")
    actor_freeze_steps: int = Field(20, ge=0, description="optimizer steps at the start that train the critic only")


class ArCHer(OfflineMethod[ArCHerConfig]):
    """Recorded turns train Q; fresh actions of the policy at recorded states train V and the policy.

    The recorded rows are `batch.experts`, the fresh ones `batch.rollouts`, each of one turn.
    """

    Config = ArCHerConfig
    paper = "ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL, arXiv 2402.19446"
    metrics = (
        Metric("archer/q", "Mean value of recorded turns, of both critics.", "reward"),
        Metric("archer/q_solved", "The same of turns of solved episodes.", "reward"),
        Metric("archer/v", "Mean value of the states that fresh actions begin in.", "reward"),
        Metric("archer/advantage", "Advantage of fresh actions.", "reward"),
        Metric("archer/advantage_size", "Absolute advantage of fresh actions.", "reward"),
    )

    def __init__(self, config: ArCHerConfig) -> None:
        super().__init__(config)
        self.frozen = config.actor_freeze_steps > 0

    @property
    def needs(self) -> Needs:
        c = self.config
        return Needs(
            data=("traces",),
            samples=c.actions_per_episode,
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
        recorded = batch.experts
        turns = turns_of(recorded.mask, recorded.steps)
        values = turns.at_end(recorded.further[f"{HEAD}{Q[0]}"]).detach()
        return Regression(values, self._targets(recorded, turns)[0], turns.exists)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        recorded, fresh = batch.experts, count(batch.rollouts.mask, "sequences")
        counts = {"expert": turns_of(recorded.mask, recorded.steps).exists.sum(), "value": fresh, "policy": fresh}
        return counts | ({"baseline": batch.rollouts.mask.sum()} if self.config.token_baseline else {})

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        return {"expert": self._of_recorded(batch.experts), **self._of_fresh(batch.rollouts)}

    def _of_recorded(self, batch: TokenBatch) -> LossSum:
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
        # The shell drops the policy's gradients, where they are not sharded.
        weight = 0.0 if self.frozen else 1.0
        seen = {
            "archer/v": (torch.stack(v).detach().mean(dim=0).sum(), n),
            "archer/advantage": (advantages.sum(), n),
            "archer/advantage_size": (advantages.abs().sum(), n),
        }
        terms = {
            "value": LossSum(errors, "sequences", n),
            "policy": LossSum(weight * losses.sum(), "sequences", n, seen),
        }
        if baseline is not None:
            apart = baseline_errors(baseline, advantages[:, 0], batch.mask)
            terms["baseline"] = LossSum(apart.sum(), "tokens", batch.mask.sum())
        return terms
