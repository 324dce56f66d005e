"""A model that scores micro-batches without a gradient, and what its passes are charged to."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.models.collate import Tensors
from posttrain.models.full_divergence import ReferenceStates
from posttrain.models.reference import Reference
from posttrain.tracking.ledger import Role


class ScoringModel:
    """Scores the rows of micro-batches as they are.

    Args:
        model: frozen, or the policy as it is.
        role: the model's, in the ledger.
    """

    def __init__(self, model: Reference, role: Role) -> None:
        self.model, self.role = model, role

    def read(self, inputs: Tensors) -> int:
        """Tokens of the rows that it reads."""
        return int(inputs["attention_mask"].sum())

    def token_logps(self, inputs: Tensors, device: torch.device) -> Tensor:
        """(B, T): log-probs of the policy's tokens under the mask."""
        return self.model.token_logps(*self._rows(inputs, device))

    def token_states(self, inputs: Tensors, device: torch.device) -> ReferenceStates:
        """What a divergence reads, of the policy's tokens under the mask."""
        return self.model.token_states(*self._rows(inputs, device))

    def close(self) -> None:
        """End what it holds beside the process."""

    def _rows(self, inputs: Tensors, device: torch.device, prefix: str = "") -> list[Tensor]:
        return [inputs[prefix + name].to(device) for name in ("ids", "attention_mask", "mask")]
