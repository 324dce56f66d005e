"""A second pass beside the policy's while it samples: what the mask model makes of the same tokens (NLPO)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.objectives.action_mask import ActionMask
from posttrain.rollouts.texts import Texts


class MaskPass:
    """The pass of a lagging policy that says which tokens are allowed.

    Args:
        mask: whose model it is.
        read: reads the prompts.
        copies: rows of each prompt.
        temperature: of the policy, and so of its copy.
    """

    def __init__(self, mask: ActionMask, read: Callable[[], Texts], copies: int, temperature: float) -> None:
        self._mask, self._temperature = mask, temperature
        with mask.in_place():
            self._texts = read()
        self._texts.repeat(copies)

    def changed(self, logits: Tensor) -> Tensor:
        """The policy's logits (B, V) with -inf where a token is not allowed."""
        return logits.masked_fill(~self._mask.allowed(self._texts.logits / self._temperature), -torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self._texts.select(rows)

    def advance(self, tokens: Tensor) -> None:
        """The tokens that were drawn, (B,)."""
        with self._mask.in_place():
            self._texts.advance(tokens)
