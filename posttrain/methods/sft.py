"""Supervised fine-tuning on written completions: the mean negative log-likelihood of their tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor
from posttrain.methods.base import Method, MethodConfig
from posttrain.objectives.aggregation import aggregate, count
from posttrain.objectives.batch import LossSum, TokenBatch
from posttrain.objectives.supervised import negative_log_likelihood


class SFTConfig(MethodConfig):
    name: Literal["sft"] = "sft"
    aggregation: Literal["tokens", "sequences"] = Field(
        "tokens", description="mean over all completion tokens of the step, or over rows of each row's token mean"
    )


class SFT(Method[SFTConfig]):
    Config = SFTConfig
    shell: ClassVar[Literal["sft"]] = "sft"
    paper = "maximum likelihood on demonstrations (no single source)"

    @property
    def needs(self) -> Needs:
        return Needs(data=("completions",), traces_instead=True)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"nll": count(batch.mask, self.config.aggregation)}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        return {"nll": aggregate(negative_log_likelihood(batch.logps), batch.mask, self.config.aggregation)}
