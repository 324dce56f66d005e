"""DPO and the variants that differ from it by a parameter only.

| variant | parameters |
| --- | --- |
| DPO (arXiv 2305.18290) | the defaults |
| conservative DPO | `loss: conservative`, `label_smoothing` |
| robust DPO (2403.00409) | `loss: robust`, `label_smoothing` |
| IPO (2310.12036) | `loss: ipo`, `tau`; `per_token: true` as in TRL |
| hinge (SLiC, 2305.10425) | `loss: hinge` |
| f-DPO (2309.16240) | `divergence: forward_kl`, `js`, or `alpha` with `alpha` |
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.objectives.batch import PreferenceBatch
from posttrain.objectives.divergences import clamped, divergence_score
from posttrain.objectives.preference import dpo_loss
from posttrain.objectives.sequences import lengths, log_ratios


class DPOConfig(MethodConfig):
    name: Literal["dpo"] = "dpo"
    beta: float = Field(
        0.1, gt=0, description="weight of the divergence from the reference; authors' README suggests 0.1 to 0.5"
    )
    loss: Literal["sigmoid", "conservative", "robust", "ipo", "hinge"] = Field(
        "sigmoid", description="function of the margin"
    )
    label_smoothing: float | None = Field(
        None, gt=0, lt=0.5, description="probability that a label is wrong; conservative and robust need it"
    )
    tau: float = Field(0.1, gt=0, description="weight of the KL in IPO, in the place of beta; ipo only (TRL's default)")
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="what ties the policy to the reference; beta means something else under each"
    )
    alpha: float = Field(
        0.5, gt=0, lt=1, description="of the alpha divergence: near 0 reverse KL, near 1 forward KL; alpha only"
    )
    per_token: bool = Field(False, description="divide the score of each response by its number of tokens")

    @model_validator(mode="after")
    def _effective(self) -> DPOConfig:
        written = self.model_fields_set
        smooth = self.loss in ("conservative", "robust")
        if smooth and self.label_smoothing is None:
            raise ValueError(f"loss {self.loss} needs label_smoothing, the probability that a label is wrong")
        if not smooth and self.label_smoothing is not None:
            raise ValueError(f"label_smoothing has no effect with loss {self.loss}: set loss: conservative or robust")
        if self.loss == "ipo" and "beta" in written:
            raise ValueError("beta has no effect with loss ipo: set tau")
        if self.loss != "ipo" and "tau" in written:
            raise ValueError(f"tau has no effect with loss {self.loss}: set beta")
        if self.divergence != "alpha" and "alpha" in written:
            raise ValueError(f"alpha has no effect with divergence {self.divergence}: set divergence: alpha")
        return self


class DPO(PairMethod[DPOConfig]):
    Config = DPOConfig
    paper = "Direct Preference Optimization, arXiv 2305.18290"

    @property
    def strength(self) -> float:
        """beta, or tau with loss ipo."""
        return self.config.tau if self.config.loss == "ipo" else self.config.beta

    def compare(self, rows: PreferenceBatch) -> Compared:
        c = self.config
        alpha = c.alpha if c.divergence == "alpha" else None
        scores: list[Tensor] = []
        stuck: list[Tensor] = []
        for role in ("chosen", "rejected"):
            tokens = rows.responses[role]
            ratio = log_ratios(tokens)
            score = divergence_score(ratio, c.divergence, alpha)
            scores.append(score / lengths(tokens) if c.per_token else score)
            stuck.append(clamped(ratio, c.divergence, alpha))
        losses = dpo_loss(scores[0], scores[1], self.strength, c.loss, c.label_smoothing or 0.0)
        rewards = (self.strength * scores[0], self.strength * scores[1])
        further = {}
        if c.divergence in ("forward_kl", "alpha"):
            further["pairs/clamped"] = (stuck[0] | stuck[1]).to(losses.dtype)
        logits = rewards[0] - rewards[1] if c.loss == "sigmoid" else None
        return Compared(losses, rewards, logits, further)
