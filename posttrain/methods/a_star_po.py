"""A*-PO: the optimal value of each prompt from stored samples of the start, then a regression on fresh ones.

The first stage is `posttrain sample` with the policy that training starts from; its trace file is `data.traces` with
`keep: all`. In the second a single completion per prompt is enough, as no group is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from numpy.random import Generator
from pydantic import Field

from posttrain.config.needs import Needs
from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Problem
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig, Metric, OnlineMethod, Scored, Start
from posttrain.objectives.aggregation import count, masked
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.optimal_advantage import advantage_regression, optimal_value

VALUE = "optimal_value"
"""Name of V* among the numbers of a start."""


class AStarPOConfig(MethodConfig):
    name: Literal["a_star_po"] = "a_star_po"
    beta_1: float = Field(0.5, gt=0, description="temperature of V*, in units of the outcome")
    beta_2: float = Field(1e-3, gt=0, description="weight of the log-ratio to the start in the regression")
    skip_all_wrong: bool = Field(False, description="leave out prompts none of whose stored samples is right")
    updates_per_rollout: int = Field(1, ge=1, description="optimizer steps on one batch of rollouts")


class AStarPO(OnlineMethod[AStarPOConfig]):
    Config = AStarPOConfig
    paper = "Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv 2505.20686"
    metrics = (
        Metric("a_star_po/advantage", "Outcome less the optimal value that stored samples gave (a_star_po).", "1"),
        Metric("a_star_po/log_ratio", "Log-ratio of policy to start, whole completions.", "nats per completion"),
    )

    @property
    def needs(self) -> Needs:
        return Needs(data=("prompts", "traces"), rollouts=True, verifier=True, reference=True)

    @property
    def linear_in_advantages(self) -> bool:
        return False

    @property
    def updates_per_rollout(self) -> int:
        return self.config.updates_per_rollout

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        """At the prompt; what is stored of it comes along."""
        outcomes = [trace.outcome for trace in traces if trace.outcome is not None]
        if not outcomes or (self.config.skip_all_wrong and max(outcomes) <= 0):
            return Start()
        return Start(info={VALUE: optimal_value(outcomes, self.config.beta_1)})

    def advantages(self, scored: Scored) -> Tensor:
        """r - V* of the outcomes: shaping is no part of what V* was made of."""
        values = scored.outcomes.new_tensor([info.get(VALUE, 0.0) for info in scored.infos])
        return torch.where(self.keep(scored), scored.outcomes - values, torch.zeros_like(values))

    def keep(self, scored: Scored) -> Tensor:
        valued = torch.tensor([VALUE in info for info in scored.infos], dtype=torch.bool)
        return scored.known & valued

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": count(batch.mask, "sequences")}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        beta, n = self.config.beta_2, self.counts(batch)["policy"]
        trained = batch.mask.any(dim=1)
        losses = advantage_regression(batch.logps, batch.ref_logps, batch.advantages, batch.mask, beta)
        ratio = masked(batch.logps.detach() - batch.ref_logps, batch.mask).sum(dim=1)
        means = {
            "a_star_po/advantage": (masked(batch.advantages, trained).sum(), n),
            "a_star_po/log_ratio": (ratio.sum(), n),
        }
        return {"policy": LossSum(masked(losses, trained).sum(), "sequences", n, means)}
