"""Advantages of completions that are compared with each other (`ContrastMethod`), before their step trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from posttrain.methods.base import ContrastMethod, Scored
from posttrain.models.collate import Tensors


def contrast(
    method: ContrastMethod,
    scored: Scored,
    batches: Sequence[Tensors],
    places: Sequence[Sequence[int]],
    policy: Callable[[Tensors], Tensor],
) -> dict[str, tuple[float, float]]:
    """Put the advantages into the micro-batches of a step; the metrics. Called on all ranks.

    Args:
        method: of the run.
        scored: completions of all ranks.
        batches: this rank's, with `ref_logps`.
        places: of the rows of each micro-batch among those of `scored`.
        policy: (B, T) log-probs of a micro-batch under the policy, 0 outside of the mask.
    """
    own: list[tuple[int, float, float]] = []
    for tensors, rows in zip(batches, places, strict=True):
        sums = (policy(tensors).sum(dim=1).tolist(), (tensors["ref_logps"] * tensors["mask"]).sum(dim=1).tolist())
        own += zip(rows, *sums, strict=True)
    known = sorted(gather_object(own))
    logps, ref_logps = (torch.tensor([entry[part] for entry in known], dtype=torch.float64) for part in (1, 2))
    made = method.weigh(scored, logps, ref_logps)
    for tensors, rows in zip(batches, places, strict=True):
        tensors["advantages"] = made.advantages[list(rows)].to(tensors["advantages"])
    return made.metrics
