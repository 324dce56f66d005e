"""Drawing tokens: one uniform number per token and row, turned into a token through the cumulative distribution.

The uniforms depend on (seed, prompt, completion, position) alone. Batch size, order, padding and the moment at which
other rows finish cannot change a draw, which makes runs repeatable and resumable.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posttrain.rollouts.engine import Sampling


def uniforms(seed: int, prompt: int, completion: int, length: int) -> np.ndarray:
    """(length,) float64 in [0, 1): the draws of one completion, by a counter-based generator."""
    mask = (1 << 64) - 1
    key: list[int] | np.ndarray = [seed & mask, (prompt << 32 | completion) & mask]
    if key[1] > 1 << 53:
        # With a seed of 64 bits beside it the list would become floats, and two completions of a prompt one key. Up to
        # here floats are exact, and the draws stay those of earlier versions.
        key = np.array(key, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(length)


def restrict(logits: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Logits (B, V) with everything outside the top k and the nucleus of mass `top_p` set to -inf.

    The nucleus is the smallest set of likeliest tokens whose mass reaches `top_p` (arXiv 1904.09751); the likeliest
    token always stays.
    """
    if top_k is not None and top_k < logits.size(-1):
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens (B,) and their log-probs (B,) under the policy at the sampling temperature.

    Args:
        logits: (B, V) of the last position.
        draws: (B,) uniforms in [0, 1), float64.
    """
    logits = logits.float()
    if sampling.greedy:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    logits = logits / sampling.temperature
    logps = logits.log_softmax(dim=-1)
    restricted = restrict(logits, sampling.top_p, sampling.top_k)
    # Float64: in float32 the cumulative sum over a large vocabulary loses the tail.
    cumulative = restricted.double().softmax(dim=-1).cumsum(dim=-1)
    # The target stays strictly below the total, so that a token of probability 0 is never drawn.
    total = cumulative[:, -1]
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return tokens, logps.gather(1, tokens.unsqueeze(1)).squeeze(1)
