"""RED, Recall-Extend Dynamics: imitation beside reinforcement, weighted by what both do to entropy and by accuracy.

The paper's own formulas of the weight and of the policy shift were not to be had; its linked code has neither. The
weight is that of a third party's implementation, the shift `ratio` a form of ours: see docs/methods/red.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from posttrain.lazy import Tensor, torch
from posttrain.methods.base import Metric, Scored
from posttrain.methods.mixed import Mixed, MixedConfig
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.expert import accuracy_shift, entropy_ratio, expert_nll, recall_extend_weight


class REDConfig(MixedConfig):
    name: Literal["red"] = "red"
    alpha: float = Field(0.1, ge=0, description="weight of the expert term before its dynamic one")
    bound: float = Field(5.0, ge=1, description="G: largest entropy ratio, and base of the accuracy factor")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the averaged changes of entropy per step")
    shift: Literal["factor", "ratio", "none"] = Field(
        "factor",
        description="what the accuracy on a trace's problem does: a factor G^(1 - 2 accuracy) of its weight, a token "
        "weight p^(1 - accuracy), or nothing",
    )
    epsilon_high: float | None = Field(0.28, gt=0, description="clip range above 1; null: epsilon")


class RED(Mixed[REDConfig]):
    """State: mean entropies of the last step, their averaged changes, and the last accuracy on each problem."""

    Config = REDConfig
    paper = "Recall-Extend Dynamics: Enhancing Small Language Models, arXiv 2508.16677"
    metrics = (
        Metric(
            "red/entropy_ratio",
            "Averaged change of entropy on expert rows over that on rollouts, clipped, which weighs RED's expert term.",
            "1",
        ),
    )

    def __init__(self, config: REDConfig) -> None:
        super().__init__(config)
        self.entropies: dict[str, float] = {}
        self.changes: dict[str, float] = {}
        self.accuracies: dict[str, float] = {}
        self.overall = 0.5

    @property
    def ratio(self) -> float:
        """The entropy ratio, from 1 to G; 1 until both parts have changed once."""
        expert, own = self.changes.get("expert/entropy", 0.0), self.changes.get("entropy", 0.0)
        return entropy_ratio(expert, own, self.config.bound)

    def observe(self, scored: Scored) -> None:
        sums: dict[str, list[float]] = {}
        for problem, outcome, known in zip(scored.problem_ids, scored.outcomes, scored.known, strict=True):
            if bool(known):
                sums.setdefault(problem, []).append(float(outcome))
        self.accuracies |= {problem: math.fsum(found) / len(found) for problem, found in sums.items()}
        if sums:
            self.overall = math.fsum(map(math.fsum, sums.values())) / sum(map(len, sums.values()))

    def expert_values(self, problem_ids: Sequence[str]) -> list[float]:
        """The last accuracy on each problem; where it has not come up, that of the last rollouts as a whole."""
        return [self.accuracies.get(problem, self.overall) for problem in problem_ids]

    def expert_losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor, float]:
        accuracy = batch.advantages.unsqueeze(1).expand_as(batch.logps)
        if self.config.shift == "factor":
            weights = recall_extend_weight(self.ratio, accuracy, self.config.bound)
        elif self.config.shift == "ratio":
            weights = self.ratio * accuracy_shift(batch.logps, accuracy)
        else:
            weights = accuracy.new_full(accuracy.shape, self.ratio)
        return expert_nll(batch.logps, weights), weights, self.config.alpha

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        terms = super().loss(batch)
        one = torch.ones(())
        terms["expert"].diagnostics["red/entropy_ratio"] = (self.ratio * one, one)
        return terms

    def end_step(self, diagnostics: Mapping[str, float]) -> None:
        for name in ("expert/entropy", "entropy"):
            now, before = diagnostics.get(name, math.nan), self.entropies.get(name)
            if not math.isfinite(now):
                continue
            self.entropies[name] = now
            if before is not None:
                decay = self.config.ema
                self.changes[name] = decay * self.changes.get(name, 0.0) + (1 - decay) * (now - before)

    def state_dict(self) -> dict[str, Any]:
        names = ("entropies", "changes", "accuracies", "overall")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)
