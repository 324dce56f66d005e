"""A second pass beside a model's while it samples: another one, whose logits are mixed into its own (Nash-MD)."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.rollouts.texts import Texts


class MixturePass:
    """The pass of the other model over the same tokens.

    Args:
        texts: the prompts as it has read them.
        copies: rows of each prompt.
        share: of its logits.
    """

    def __init__(self, texts: Texts, copies: int, share: float) -> None:
        self._texts, self._share = texts, share
        self._texts.repeat(copies)

    def changed(self, logits: Tensor) -> Tensor:
        """(1 - share) logits + share those of the other, (B, V): p^(1 - share) q^share, once it is normalised."""
        return torch.lerp(logits, self._texts.logits, self._share)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self._texts.select(rows)

    def advance(self, tokens: Tensor) -> None:
        """The tokens that were drawn, (B,)."""
        self._texts.advance(tokens)
