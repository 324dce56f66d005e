"""Supervised objectives, per token."""

from __future__ import annotations

from posttrain.lazy import Tensor


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """-log p(token | prefix), (B, T)."""
    return -logps
