"""From per-token losses to sums with a unit. The three ways the literature averages, minus the division.

Rows without a trained token contribute nothing and are not counted, and the sum of an empty batch is a zero that
one can call backward on.
"""

from __future__ import annotations

from typing import Literal

from posttrain.lazy import Tensor, torch
from posttrain.objectives.batch import LossSum, Unit

Aggregation = Literal["tokens", "sequences", "constant"]

UNIT: dict[str, Unit] = {"tokens": "tokens", "sequences": "sequences", "constant": "sequences"}


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where mask is set and exactly 0 elsewhere; unlike a product, also where `values` is not finite."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def count(mask: Tensor, aggregation: Aggregation) -> Tensor:
    """Number of units in `mask` (B, T): trained tokens, or rows with at least one of them; int64."""
    return mask.sum() if aggregation == "tokens" else mask.any(dim=1).sum()


def aggregate(losses: Tensor, mask: Tensor, aggregation: Aggregation, *, max_length: int | None = None) -> LossSum:
    """Sum of per-token losses (B, T) in the unit of `aggregation`.

    - `tokens`: sum over trained tokens; divided by their number it is DAPO's token mean (arXiv 2503.14476, eq. 8).
    - `sequences`: sum over rows of the row's token mean; GRPO (arXiv 2402.03300, eq. 3).
    - `constant`: sum over rows of the token sum over `max_length`; Dr. GRPO (arXiv 2503.20783): no length bias.

    Raises:
        ValueError: `constant` without `max_length`.
    """
    kept = masked(losses, mask)
    if aggregation == "tokens":
        value = kept.sum()
    elif aggregation == "sequences":
        value = (kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()
    else:
        if max_length is None:
            raise ValueError("aggregation 'constant' divides by max_length")
        value = kept.sum() / max_length
    return LossSum(value=value, unit=UNIT[aggregation], count=count(mask, aggregation))
