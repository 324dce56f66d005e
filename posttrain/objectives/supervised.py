"""Supervised objectives, per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """-log p(token | prefix), (B, T)."""
    return -logps
