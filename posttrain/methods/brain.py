"""BRAIn: distils the reward-conditioned posterior over n responses of a prompt, with a self-normalised baseline."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Preference, Sample
from posttrain.errors import DataError, nearest
from posttrain.lazy import torch
from posttrain.methods.base import MethodConfig, Metric, PreferenceMethod
from posttrain.methods.pairs import mean_shift
from posttrain.methods.scored import numbered_responses, numbered_roles, numbered_samples
from posttrain.objectives.batch import LossSum, PreferenceBatch
from posttrain.objectives.preference import brain_loss
from posttrain.objectives.sequences import sequence_logps, sequence_ref_logps


class BRAInConfig(MethodConfig):
    name: Literal["brain"] = "brain"
    n: int = Field(8, ge=2, description="scored responses per row (ours: the paper's number is not known to us)")
    tau: float = Field(1.0, gt=0, description="temperature that divides the score (ours, as n)")
    proposal_logps: str | None = Field(
        None,
        description="column with the n log-probs of the responses under the policy that sampled them, in the order of "
        "chosen, rejected, others; default: they were sampled from the starting policy",
    )


class BRAIn(PreferenceMethod[BRAInConfig]):
    """Roles `response_0`, ...: chosen, rejected and the others, with their scores as rewards."""

    Config = BRAInConfig
    term = "posterior"
    paper = "BRAIn: Bayesian Reward-conditioned Amortized Inference, arXiv 2402.02479"
    metrics = (
        Metric(
            "brain/target_ess",
            "Effective number of responses of a row under BRAIn's target weights. Near 1 the best one takes all.",
            "responses",
        ),
        Metric("brain/policy_ess", "Effective number of responses of a row under the policy's weights.", "responses"),
        Metric("brain/best_weight", "The policy's weight of the response with the largest reward.", "share"),
    )

    @property
    def columns(self) -> dict[str, list[float]]:
        column = self.config.proposal_logps
        return {} if column is None else {column: [-2.0 - i for i in range(self.config.n)]}

    def responses(self, row: Preference, renderer: Renderer) -> dict[str, Sample]:
        return numbered_samples(row, self.config.n, renderer)

    def values(self, row: Preference) -> dict[str, float | list[float]]:
        found: dict[str, float | list[float]] = {
            "rewards": [one.score for one in numbered_responses(row, self.config.n)]
        }
        if self.config.proposal_logps is not None:
            found["proposal_logps"] = self._proposal(row, self.config.proposal_logps)
        return found

    def _proposal(self, row: Preference, column: str) -> list[float]:
        meta, where = row.problem.meta, f"{row.problem.where}, column {column!r}"
        if column not in meta:
            raise DataError(f"no column {column!r}", where=row.problem.where, hint=nearest(column, map(str, meta)))
        found = meta[column]
        numbers = isinstance(found, list | tuple) and all(isinstance(x, int | float) and x <= 0 for x in found)
        if not numbers or len(found) != self.config.n or not all(map(math.isfinite, found)):
            raise DataError(f"must be a list of {self.config.n} log-probs, got {found!r}", where=where)
        return [float(x) for x in found]

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        rows = batch.rows(batch.usable)
        tokens = [rows.responses[role] for role in numbered_roles(self.config.n)]
        logps = torch.stack([sequence_logps(one) for one in tokens], dim=1)
        prior = torch.stack([sequence_ref_logps(one) for one in tokens], dim=1)
        rewards = rows.values["rewards"].to(logps)
        proposal = rows.values.get("proposal_logps")
        losses, target, policy = brain_loss(
            logps, prior, rewards, self.config.tau, None if proposal is None else proposal.to(logps)
        )
        best = rewards.argmax(dim=1, keepdim=True)
        shifts = torch.stack([mean_shift(one) for one in tokens], dim=1)
        metrics = {
            "brain/target_ess": 1 / (target**2).sum(dim=1),
            "brain/policy_ess": 1 / (policy**2).sum(dim=1),
            "brain/best_weight": policy.gather(1, best).squeeze(1),
            "pairs/chosen_shift": shifts.gather(1, best).squeeze(1),
        }
        n = self.counts(batch)["posterior"]
        sums = {name: (values.sum(), n) for name, values in metrics.items()}
        return {"posterior": LossSum(losses.sum(), "groups", n, sums)}
