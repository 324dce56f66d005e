"""From a `TokenBatch` to numbers per sequence, (B,). What stands outside the mask is never read."""

from __future__ import annotations

from posttrain.lazy import Tensor
from posttrain.objectives.aggregation import masked
from posttrain.objectives.batch import TokenBatch


def lengths(tokens: TokenBatch) -> Tensor:
    """Number of trained tokens."""
    return tokens.mask.sum(dim=1)


def sequence_logps(tokens: TokenBatch) -> Tensor:
    """Log-prob of the completion under the policy: the sum over its tokens, with gradient."""
    return masked(tokens.logps, tokens.mask).sum(dim=1)


def mean_logps(tokens: TokenBatch) -> Tensor:
    """Log-prob per token; 0 for an empty completion."""
    return sequence_logps(tokens) / lengths(tokens).clamp(min=1)


def sequence_ref_logps(tokens: TokenBatch) -> Tensor:
    """Log-prob of the completion under the reference."""
    return masked(tokens.ref_logps, tokens.mask).sum(dim=1)


def log_ratios(tokens: TokenBatch) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x), with gradient."""
    return sequence_logps(tokens) - sequence_ref_logps(tokens)
