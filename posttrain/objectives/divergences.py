"""Scores f'(u) of f-DPO (arXiv 2309.16240) in the log-ratio t = log u = log pi(y|x) - log pi_ref(y|x), and log1mexp.

| divergence | score | d score / dt |
| --- | --- | --- |
| reverse_kl | t | 1 |
| forward_kl | -exp(-t) | exp(-t) |
| js | ln 2 - softplus(-t) | sigmoid(-t) |
| alpha, 0 < alpha < 1 | (1 - exp(-alpha t)) / alpha | exp(-alpha t) |

Each up to an additive constant, which cancels between the two responses of a pair. alpha -> 0 is reverse KL, alpha -> 1
forward KL. TRL's `f_alpha_divergence_coef` is 1 - alpha.
"""

from __future__ import annotations

import math
from typing import Literal

from posttrain.lazy import Tensor, functional, torch

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

MAX_EXPONENT = 80.0
"""Exponents are clamped here: exp(80) and what a loss makes of it are finite in float32. Beyond, no gradient."""


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float | None = None) -> Tensor:
    """f'(u) for u = exp(log_ratio), of the shape of `log_ratio`; see the table above.

    Args:
        log_ratio: summed over the tokens of a response.
        alpha: of the alpha-divergence, in the paper's parameterisation, within (0, 1).

    Raises:
        ValueError: divergence `alpha` without an alpha within (0, 1).
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return math.log(2.0) - functional.softplus(-log_ratio)
    if divergence == "forward_kl":
        return -(-log_ratio).clamp(max=MAX_EXPONENT).exp()
    if alpha is None or not 0 < alpha < 1:
        raise ValueError(f"the alpha-divergence needs alpha within (0, 1), got {alpha}")
    return -torch.expm1((-alpha * log_ratio).clamp(max=MAX_EXPONENT)) / alpha


def clamped(log_ratio: Tensor, divergence: Divergence, alpha: float | None = None) -> Tensor:
    """Bool, of the shape of `log_ratio`: where `divergence_score` clamped its exponent."""
    if divergence == "forward_kl":
        return -log_ratio > MAX_EXPONENT
    if divergence == "alpha":
        return -(alpha or 0.0) * log_ratio > MAX_EXPONENT
    return torch.zeros_like(log_ratio, dtype=torch.bool)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a < 0, accurate at both ends (Maechler 2012: the switch is at -ln 2)."""
    switch = -math.log(2.0)
    # Each branch sees only values it can take: the other's infinite gradient would come back as 0 * inf.
    near = torch.log(-torch.expm1(a.clamp(min=switch)))
    far = torch.log1p(-torch.exp(a.clamp(max=switch)))
    return torch.where(a > switch, near, far)
