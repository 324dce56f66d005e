"""Divergences between two distributions of the next token, each a pure function of log-probs (N, V) to (N,).

The first argument is the policy's and has a gradient; the second a frozen model's: reference, or teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from posttrain.lazy import Tensor, torch

NextTokenDivergence = Callable[["Tensor", "Tensor"], "Tensor"]
"""(N, V) log-probs of the policy and of a frozen model -> (N,) nats."""


def reverse_kl(logps: Tensor, frozen_logps: Tensor) -> Tensor:
    """KL(policy || frozen) = sum over v of pi(v) (log pi(v) - log p(v)), (N,)."""
    return (logps.exp() * (logps - frozen_logps)).sum(-1)


def generalised_jsd(logps: Tensor, frozen_logps: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(pi || m) with m = beta p + (1 - beta) pi, (N,); p is the frozen model.

    GKD (arXiv 2306.13649, eq. 1), weighed as in TRL's `generalized_jsd_loss`. Its limits at the ends are 0, so there
    beta = 0 stands for KL(p || pi), and 1 for KL(pi || p).
    """
    if beta == 0:
        return reverse_kl(frozen_logps, logps)
    if beta == 1:
        return reverse_kl(logps, frozen_logps)
    # By log pi(v) the derivative is (1 - beta) pi(v) (log pi(v) - log m(v)): all others cancel. Written out, a graph of
    # one product stands in for ten of the size of the vocabulary.
    with torch.no_grad():
        own, frozen = logps.exp(), frozen_logps.exp()
        mixed = torch.lerp(own, frozen, beta).clamp_(min=torch.finfo(own.dtype).tiny).log_()
        slope = own.mul_(logps - mixed).mul_(1 - beta)
        value = slope.sum(-1) + beta * (frozen * (frozen_logps - mixed)).sum(-1)
    along = (slope * logps).sum(-1)
    return value + (along - along.detach())


def on_support(
    logps: Tensor, frozen_logps: Tensor, k: int, support: Literal["policy", "teacher"], *, tail: bool
) -> tuple[Tensor, Tensor]:
    """Both distributions on the k likeliest tokens of one of them, as log-probs of the same width.

    With `tail` all other tokens become one more outcome, (N, k + 1); a divergence of the two is then never above that
    of the whole distributions. Without it what is left is renormalised, (N, k). With k >= V nothing changes.
    """
    if k >= logps.shape[-1]:
        return logps, frozen_logps
    chosen = (logps.detach() if support == "policy" else frozen_logps).topk(k, dim=-1).indices

    def reduced(whole: Tensor) -> Tensor:
        kept = whole.gather(-1, chosen)
        if not tail:
            return kept - kept.logsumexp(-1, keepdim=True)
        rest = whole.scatter(-1, chosen, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([kept, rest], dim=-1)

    return reduced(logps), reduced(frozen_logps)
