"""The reference policy as an explicit object: a frozen copy, or the policy with its adapter switched off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.models.token_logps import token_logps


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the weights as they are now, in eval mode, without gradients. Never reloaded from a path."""
    reference = copy.deepcopy(model).eval()
    reference.requires_grad_(False)
    return reference


class Reference:
    """Args:
    model: a model made ready by `token_logps.prepare`: a frozen copy, or the policy itself.
    without_adapter: for the policy itself, a context manager factory that switches its adapter off.
    """

    def __init__(
        self, model: torch.nn.Module, without_adapter: Callable[[], AbstractContextManager] | None = None
    ) -> None:
        self.model, self.without_adapter = model, without_adapter

    @torch.no_grad()
    def token_logps(self, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """Log-probs (B, T) of the tokens under `mask`, aligned to tokens."""
        if self.without_adapter is None:
            return token_logps(self.model, ids, attention_mask, mask)[0]
        was_training = self.model.training
        self.model.eval()
        try:
            with self.without_adapter():
                return token_logps(self.model, ids, attention_mask, mask)[0]
        finally:
            self.model.train(was_training)
