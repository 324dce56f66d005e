"""ASFT (Aligned, not Anchored, SFT): likelihood of chosen, unlikelihood of rejected, each on its own. No reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.preference import LARGEST_MEAN_LOGP, asft_loss, log_odds
from posttrain.objectives.sequences import mean_logps


class ASFTConfig(MethodConfig):
    name: Literal["asft"] = "asft"
    lam: float = Field(
        1.0,
        ge=0,
        description="lambda, weight of the alignment term; 1 was best in arXiv 2502.01237; 0 is SFT on chosen",
    )
    b: float = Field(1.0, gt=0, description="tempering of the log-odds (arXiv 2502.01237); 1 is the method's own")

    @model_validator(mode="after")
    def _effective(self) -> ASFTConfig:
        if self.lam == 0 and "b" in self.model_fields_set:
            raise ValueError("b has no effect with lam 0")
        return self


class ASFT(PairMethod[ASFTConfig]):
    Config = ASFTConfig
    paper = "ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood, arXiv 2409.10571"

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",))

    def compare(self, rows: PreferenceBatch) -> Compared:
        mean_w, mean_l = (mean_logps(rows.responses[role]) for role in ("chosen", "rejected"))
        losses = asft_loss(mean_w, mean_l, self.config.lam, self.config.b)
        stuck = (mean_w > LARGEST_MEAN_LOGP) | (mean_l > LARGEST_MEAN_LOGP)
        further = {"pairs/clamped": stuck.to(losses.dtype)}
        return Compared(losses, (log_odds(mean_w), log_odds(mean_l)), further=further)
