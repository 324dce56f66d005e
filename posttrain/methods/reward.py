"""Reward model: a sequence classifier with one output, trained on pairs by the likelihood of Bradley and Terry."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from posttrain.config.needs import Needs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Preference, Sample
from posttrain.methods.base import MethodConfig, PreferenceMethod
from posttrain.methods.pairs import reward_metrics
from posttrain.methods.scored import number_of
from posttrain.objectives.batch import LossSum, PreferenceBatch
from posttrain.objectives.reward import bradley_terry_loss


class RewardConfig(MethodConfig):
    name: Literal["reward"] = "reward"
    margin: str | None = Field(
        None, description="column with the margin that the scores of a row should keep; default: none"
    )
    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="weight of the squared sum of both scores, which holds their mean near 0 (as in TRL)"
    )


class Reward(PreferenceMethod[RewardConfig]):
    """Term `preference` (unit: pairs). Its scores stand in `TokenBatch.scores`."""

    Config: ClassVar[type[MethodConfig]] = RewardConfig
    shell: ClassVar[Literal["reward"]] = "reward"
    paper = "the explicit reward model of arXiv 2409.03650; margin: arXiv 2307.09288"

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",), classifier=True)

    @property
    def columns(self) -> dict[str, float]:
        return {} if self.config.margin is None else {self.config.margin: 0.3}

    def responses(self, row: Preference, renderer: Renderer) -> dict[str, Sample]:
        return {
            role: renderer.conversation(Example(row.problem, text))
            for role, text in (("chosen", row.chosen), ("rejected", row.rejected))
        }

    def values(self, row: Preference) -> dict[str, float | list[float]]:
        return {} if self.config.margin is None else {"margin": number_of(row, self.config.margin)}

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        rows = batch.rows(batch.usable)
        chosen, rejected = rows.responses["chosen"].scores, rows.responses["rejected"].scores
        margin = rows.values.get("margin")
        margin = None if margin is None else margin.to(chosen)
        losses = bradley_terry_loss(chosen, rejected, margin, self.config.center_rewards_coefficient)
        n = self.counts(batch)["preference"]
        metrics = reward_metrics(rows, (chosen.detach(), rejected.detach()))
        sums = {name: (values.sum(), n) for name, values in metrics.items()}
        return {"preference": LossSum(losses.sum(), "pairs", n, sums)}
