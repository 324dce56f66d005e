"""Router logits of a mixture of experts, taken from the scoring passes of a training step as they are computed.

Who wants them enters `collecting`. A scoring pass asks the model for them within that only, so others compute and keep
nothing. A token counts as often as rows hold it, and rows count up to the token that predicts their last scored one:
whatever a pass pads, cuts, or computes once for several rows, the sums are those of plain rows without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posttrain.models.shared_prefix import Layout


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routers of a mixture of experts did in a pass.

    Attributes:
        logits: of every layer with experts (N, E), for the N tokens of a pass.
        weights: (N,) how many rows hold a token; 0 for padding and behind the last scored token.
    """

    logits: tuple[Tensor, ...]
    weights: Tensor


@dataclass(slots=True)
class _Collected:
    gradient: bool
    passes: list[Routing] = field(default_factory=list)


_collected: ContextVar[_Collected | None] = ContextVar("router", default=None)


@contextmanager
def collecting(*, gradient: bool) -> Iterator[list[Routing]]:
    """What routers say in the scoring passes of the block.

    Args:
        gradient: passes with a gradient are meant, as those of a policy in its loss and not of a reference beside it;
            else those without.
    """
    found = _Collected(gradient)
    token = _collected.set(found)
    try:
        yield found.passes
    finally:
        _collected.reset(token)


def wanted() -> bool:
    """Whether this scoring pass is one that somebody collects from."""
    found = _collected.get()
    return found is not None and found.gradient == torch.is_grad_enabled()


def asked() -> dict[str, bool]:
    """Arguments of the model's forward, so that it returns router logits if they are wanted."""
    return {"output_router_logits": True} if wanted() else {}


def keep(output: Any, shape: tuple[int, int], predictors: Tensor, layout: Layout | None) -> None:
    """Hand over the router logits of a pass, if they are wanted.

    Args:
        output: what the model's forward has returned.
        shape: rows and columns of the pass.
        predictors: (K,) places in the flattened pass whose hidden state predicts a scored token.
        layout: of a pass without padding; None for plain rows.
    """
    collected = _collected.get()
    if collected is None or not wanted():
        return
    logits = tuple(layer.flatten(0, -2) for layer in output.router_logits)
    collected.passes.append(Routing(logits, times_held(shape, predictors, layout)))


def times_held(shape: tuple[int, int], predictors: Tensor, layout: Layout | None) -> Tensor:
    """(N,) how many rows hold each token of a pass. Arguments as in `keep`."""
    rows, width = shape
    device = predictors.device
    if layout is not None:
        held = torch.ones(width, device=device)
        for part, _ in (each for group in layout.groups for each in group.walk()):
            held[part.segment.start : part.segment.start + part.segment.length] = part.rows
        return held
    ends = torch.zeros(rows, dtype=torch.long, device=device)
    ends.scatter_reduce_(0, predictors // width, predictors % width + 1, "amax")
    return (torch.arange(width, device=device) < ends[:, None]).flatten().float()
