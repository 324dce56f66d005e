"""BCO: a classifier of good and bad completions whose logit is the implicit reward above its running mean."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig
from posttrain.methods.unpaired import UnpairedMethod
from posttrain.objectives.unpaired import bco_loss


class BCOConfig(MethodConfig):
    name: Literal["bco"] = "bco"
    beta: float = Field(0.1, gt=0, description="scale of the implicit reward (TRL's default; the paper's pairs: 0.01)")


class BCO(UnpairedMethod[BCOConfig]):
    Config = BCOConfig
    scores: ClassVar[Literal["mismatched", "own"]] = "own"
    paper = "Binary Classifier Optimization for Large Language Model Alignment, arXiv 2404.04656"

    def __init__(self, config: BCOConfig) -> None:
        super().__init__(config)
        self.total, self.rows = 0.0, 0

    def observe(self, total: float, n: int) -> None:
        """Every row seen counts alike and for ever, those of the step among them."""
        self.total, self.rows = self.total + self.config.beta * total, self.rows + n

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.rows = float(state["total"]), int(state["rows"])

    @property
    def reference_point(self) -> float:
        return self.total / max(self.rows, 1)

    def rewards(self, log_ratios: Tensor) -> Tensor:
        return self.config.beta * log_ratios

    def losses(self, log_ratios: Tensor, good: Tensor) -> Tensor:
        return bco_loss(log_ratios, good, self.reference_point, self.config.beta)
