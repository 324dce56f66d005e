"""ORPO: likelihood of the chosen response plus the odds ratio of both, in one run from a base model, no reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.needs import Needs
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.preference import LARGEST_MEAN_LOGP, log_odds, orpo_loss
from posttrain.objectives.sequences import mean_logps


class ORPOConfig(MethodConfig):
    name: Literal["orpo"] = "orpo"
    lam: float = Field(
        0.1, ge=0, description="lambda, weight of the odds ratio beside the likelihood (authors' run); 0 is SFT"
    )


class ORPO(PairMethod[ORPOConfig]):
    Config = ORPOConfig
    paper = "ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691"

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",))

    @property
    def likelihood(self) -> tuple[str, float]:
        return "chosen", 1.0

    def compare(self, rows: PreferenceBatch) -> Compared:
        means = [mean_logps(rows.responses[role]) for role in ("chosen", "rejected")]
        losses = self.config.lam * orpo_loss(*means)
        odds = (log_odds(means[0]), log_odds(means[1]))
        certain = (means[0] > LARGEST_MEAN_LOGP) | (means[1] > LARGEST_MEAN_LOGP)
        return Compared(losses, odds, odds[0] - odds[1], {"pairs/clamped": certain.to(losses.dtype)})
