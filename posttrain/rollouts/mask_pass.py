"""A second pass beside the policy's while it samples: what the mask model makes of the same tokens (NLPO)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from posttrain.objectives.action_mask import ActionMask

Read = Callable[[], tuple[Tensor, DynamicCache, Tensor]]
Advance = Callable[[Tensor, DynamicCache, Tensor], tuple[Tensor, Tensor]]


class MaskPass:
    """Args:
    mask: whose model it is.
    read: reads the prompts into a cache of its own.
    advance: goes on by a token per row.
    copies: rows of each prompt.
    temperature: of the policy, and so of its copy.
    """

    def __init__(self, mask: ActionMask, read: Read, advance: Advance, copies: int, temperature: float) -> None:
        self._mask, self._step, self._temperature = mask, advance, temperature
        with mask.in_place():
            logits, self._cache, attention = read()
        self._logits, self._attention = logits.repeat_interleave(copies, 0), attention.repeat_interleave(copies, 0)
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)

    def restrict(self, logits: Tensor) -> Tensor:
        """The policy's logits (B, V) with -inf where a token is not allowed."""
        return logits.masked_fill(~self._mask.allowed(self._logits / self._temperature), -torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self._cache.batch_select_indices(rows)
        self._attention = self._attention[rows]

    def advance(self, tokens: Tensor) -> None:
        """The tokens that were drawn, (B,)."""
        with self._mask.in_place():
            self._logits, self._attention = self._step(tokens, self._cache, self._attention)
