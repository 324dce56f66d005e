"""CPL: log-probs as advantages under the regret model of preferences, with a conservative bias. No reference.

| variant | parameters |
| --- | --- |
| CPL (arXiv 2310.13639) | the defaults |
| CPL-KL | `kl: true`, `alpha: 0.2`, `lam: 0.75`: log-ratios to the reference in the place of log-probs |
| CPL-BC | `bc_weight: 1.0`, `lam: 1.0` |
| rank mode | `responses: n`, every two of n scored responses |
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Preference, Sample
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import TIE, Compared, PairMethod
from posttrain.methods.scored import numbered_responses, numbered_roles, numbered_samples
from posttrain.objectives.batch import LossSum, PreferenceBatch, TokenBatch
from posttrain.objectives.preference import cpl_loss, cpl_rank_loss
from posttrain.objectives.sequences import lengths, log_ratios, sequence_logps


class CPLConfig(MethodConfig):
    name: Literal["cpl"] = "cpl"
    alpha: float = Field(
        0.1, gt=0, description="the advantage is alpha times the log-prob; authors' value for control, text wants less"
    )
    lam: float = Field(
        0.5, gt=0, le=1, description="lambda, conservative bias on rejected; 1 is off; authors' value for control"
    )
    kl: bool = Field(False, description="CPL-KL: log-ratios to the reference in the place of log-probs")
    per_token: bool = Field(False, description="divide each log-prob by its number of tokens")
    bc_weight: float = Field(
        0.0, ge=0, description="CPL-BC: weight of the token-mean negative log-likelihood of chosen"
    )
    responses: int = Field(2, ge=2, description="above 2: rank mode, over every two of that many scored responses")

    @model_validator(mode="after")
    def _effective(self) -> CPLConfig:
        if self.responses > 2 and self.bc_weight > 0:
            raise ValueError("bc_weight has no effect with responses above 2: no response there is the chosen one")
        return self


class CPL(PairMethod[CPLConfig]):
    Config = CPLConfig
    paper = "Contrastive Preference Learning, arXiv 2310.13639"

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",), reference=self.config.kl)

    @property
    def ranks(self) -> bool:
        return self.config.responses > 2

    @property
    def likelihood(self) -> tuple[str, float]:
        return "chosen", self.config.bc_weight

    def responses(self, row: Preference, renderer: Renderer) -> dict[str, Sample]:
        if self.ranks:
            return numbered_samples(row, self.config.responses, renderer)
        return super().responses(row, renderer)

    def values(self, row: Preference) -> dict[str, float | list[float]]:
        """The scores, or the probability that chosen is better: 1, or 1/2 where both have the same score."""
        if self.ranks:
            return {"scores": [one.score for one in numbered_responses(row, self.config.responses)]}
        scored = "chosen" in row.scores and "rejected" in row.scores
        return {"preference": 0.5 if scored and row.scores["chosen"] == row.scores["rejected"] else 1.0}

    def counts(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        if not self.ranks:
            return super().counts(batch)
        scores = batch.values["scores"][batch.usable]
        differ = scores.unsqueeze(1) > scores.unsqueeze(2)
        return {"preference": differ.sum().to(scores.dtype)}

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        if not self.ranks:
            return super().loss(batch)
        rows = batch.rows(batch.usable)
        advantages = torch.stack(
            [self._advantage(rows.responses[role]) for role in numbered_roles(self.config.responses)], dim=1
        )
        scores = rows.values["scores"].to(advantages)
        losses, pairs = cpl_rank_loss(advantages, scores, self.config.lam)
        better = scores.unsqueeze(2) > scores.unsqueeze(1)
        difference = (advantages.unsqueeze(2) - advantages.unsqueeze(1)).detach()[better]
        count = pairs.sum()
        sums = {
            "pairs/margin": (difference.sum(), count),
            "pairs/accuracy": ((difference > TIE).to(count.dtype).sum(), count),
            "pairs/ties": ((difference.abs() <= TIE).to(count.dtype).sum(), count),
        }
        return {"preference": LossSum(losses.sum(), "pairs", count, sums)}

    def compare(self, rows: PreferenceBatch) -> Compared:
        advantages = [self._advantage(rows.responses[role]) for role in ("chosen", "rejected")]
        preference = rows.values["preference"].to(advantages[0])
        losses = cpl_loss(advantages[0], advantages[1], self.config.lam, preference)
        logits = advantages[0] - self.config.lam * advantages[1]
        return Compared(losses, (advantages[0], advantages[1]), logits)

    def _advantage(self, tokens: TokenBatch) -> Tensor:
        total = log_ratios(tokens) if self.config.kl else sequence_logps(tokens)
        return self.config.alpha * (total / lengths(tokens) if self.config.per_token else total)
