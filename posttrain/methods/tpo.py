"""TPO and TPO-L: contrast of the second-best and the worst response, plus likelihood of a gold one. No reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Preference, Sample
from posttrain.errors import DataError
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.methods.scored import scored_responses, texts
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.preference import simpo_loss, tpo_loss
from posttrain.objectives.sequences import mean_logps, sequence_logps

DEFAULT_BETA = {"tpo": 0.1, "tpo_l": 2.0}


class TPOConfig(MethodConfig):
    name: Literal["tpo"] = "tpo"
    variant: Literal["tpo", "tpo_l"] = Field("tpo", description="compare sums, or means per token with a margin")
    beta: float | None = Field(
        None,
        gt=0,
        description="scale of the contrast; default: 0.1 for tpo (authors' script), 2 for tpo_l (as in SimPO)",
    )
    alpha: float = Field(
        0.5, ge=0, description="weight of the gold response's token-mean negative log-likelihood (authors' script)"
    )
    gamma: float = Field(0.5, ge=0, description="target margin itself, tpo_l only (TRL's default)")

    @model_validator(mode="after")
    def _effective(self) -> TPOConfig:
        if self.variant == "tpo" and "gamma" in self.model_fields_set:
            raise ValueError("gamma has no effect with variant tpo: set variant: tpo_l")
        return self


class TPO(PairMethod[TPOConfig]):
    Config = TPOConfig
    paper = "Triple Preference Optimization, arXiv 2405.16681"

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",))

    @property
    def beta(self) -> float:
        return DEFAULT_BETA[self.config.variant] if self.config.beta is None else self.config.beta

    @property
    def likelihood(self) -> tuple[str, float]:
        return "gold", self.config.alpha

    def prepare(self, rows: Sequence[Preference]) -> list[Preference]:
        """Rows with a `gold` response as they are; others made of their scored responses: gold is the best of them,
        chosen the second best, rejected the worst."""
        return [row if self.config.alpha == 0 or "gold" in row.others else _triple(row) for row in rows]

    def responses(self, row: Preference, renderer: Renderer) -> dict[str, Sample]:
        found = super().responses(row, renderer)
        if self.config.alpha > 0:
            found["gold"] = renderer.sample(Example(row.problem, row.others["gold"]))
        return found

    def compare(self, rows: PreferenceBatch) -> Compared:
        chosen, rejected = rows.responses["chosen"], rows.responses["rejected"]
        if self.config.variant == "tpo":
            values, gamma = (sequence_logps(chosen), sequence_logps(rejected)), 0.0
            losses = tpo_loss(*values, self.beta)
        else:
            values, gamma = (mean_logps(chosen), mean_logps(rejected)), self.config.gamma
            losses = simpo_loss(*values, self.beta, gamma)
        rewards = (self.beta * values[0], self.beta * values[1])
        return Compared(losses, rewards, rewards[0] - rewards[1] - gamma)


def _triple(row: Preference) -> Preference:
    if len(texts(row)) < 3:
        raise DataError(
            "no gold response",
            where=row.problem.where,
            hint="name its column: data.preferences.others: {gold: <column>}; or set method.alpha to 0",
        )
    ranked = sorted(scored_responses(row), key=lambda response: -response.score)
    gold, chosen, rejected = ranked[0], ranked[1], ranked[-1]
    if not chosen.score > rejected.score:
        raise DataError("the second-best and the worst response have the same score", where=row.problem.where)
    return replace(
        row,
        chosen=chosen.text,
        rejected=rejected.text,
        others={"gold": gold.text},
        scores={"gold": gold.score, "chosen": chosen.score, "rejected": rejected.score},
    )
