"""A*-PO (arXiv 2505.20686): the optimal value of a prompt from stored samples, and the regression on what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.lazy import Tensor
from posttrain.objectives.aggregation import masked


def optimal_value(rewards: Sequence[float], beta: float) -> float:
    """V* = beta log mean exp(r / beta) over samples of the reference policy; their largest where beta is small.

    Too low in the mean for few samples, by Jensen's inequality.
    """
    highest = max(rewards)
    return highest + beta * math.log(math.fsum(math.exp((r - highest) / beta) for r in rewards) / len(rewards))


def advantage_regression(logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor, beta: float) -> Tensor:
    """(beta u - A)^2 / (2 beta) per row, (B,), with u the log-ratio of the completion to the reference.

    The paper's square, divided by 2 beta so that the gradient by u is beta u - A: undivided it has the factor 2 beta,
    some thousandths, which clipping of gradients never sees. At the optimum u = A / beta, whatever the length.

    Args:
        logps, ref_logps, mask: (B, T); advantages: (B,), r - V*.
    """
    ratio = masked(logps - ref_logps, mask).sum(dim=1)
    return (beta * ratio - advantages) ** 2 / (2 * beta)
