"""Tokens whose gradient is dropped because they lower the entropy most (`companions.CovariantTokens`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object

from posttrain.methods.companions import DROPPED, CovariantTokens
from posttrain.models.collate import FURTHER, Tensors, actions
from posttrain.objectives.policy_gradient import covariances, per_token
from posttrain.objectives.returns import moments

DROP_STREAM = 8
"""Tells this draw from others of the same seed."""


def mark_covariant(
    wanted: CovariantTokens, batches: Sequence[Tensors], places: Sequence[Sequence[int]], seed: int
) -> None:
    """Put 1 where a token is dropped into the micro-batches of a rollout, else 0. Called on all ranks.

    Means and numbers are those of all ranks' tokens, and each token within the bounds is drawn by itself, so that what
    is drawn depends on no split: the number is the share on average.

    Args:
        batches: this rank's, with `old_logps`.
        places: of the rows of each micro-batch among all ranks' completions.
        seed: as `Scored.seed`.
    """
    acted = [actions(tensors) for tensors in batches]
    values = [(tensors["old_logps"], per_token(tensors["advantages"], tensors["old_logps"])) for tensors in batches]
    sums = [torch.stack([moments(each, mask) for each in pair]) for pair, mask in zip(values, acted, strict=True)]
    (n, logp, _), (_, advantage, _) = _over_ranks(torch.stack(sums).sum(dim=0))
    found = [covariances(*pair, logp / max(n, 1), advantage / max(n, 1)) for pair in values]
    within = [mask & (each >= wanted.low) & (each <= wanted.high) for each, mask in zip(found, acted, strict=True)]
    ((candidates,),) = _over_ranks(torch.tensor([[float(sum(int(each.sum()) for each in within))]]))
    chance = min(1.0, wanted.share * n / max(candidates, 1))
    for tensors, inside, mask, rows in zip(batches, within, acted, places, strict=True):
        dropped = torch.zeros(mask.shape)
        for number, place in enumerate(rows):
            own = mask[number]
            draws = np.random.default_rng([seed, place, DROP_STREAM]).random(int(own.sum()))
            dropped[number, own] = torch.from_numpy(draws < chance).float()
        tensors[FURTHER + DROPPED] = dropped * inside


def _over_ranks(part: torch.Tensor) -> list[list[float]]:
    """The sum of all ranks' parts, in the order of ranks."""
    return torch.tensor(gather_object([part.tolist()]), dtype=torch.float64).sum(dim=0).tolist()
