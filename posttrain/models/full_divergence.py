"""Divergence of the policy's next-token distribution from a frozen model's, over the whole vocabulary, without (N, V)
in memory.

The estimate from taken tokens (k3) cannot see where probability goes that no trace holds. This sum can: it costs a
forward pass of the frozen model in every step, and a product with both heads, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from posttrain.models.scored_head import LogitMap, tile_rows
from posttrain.objectives.next_token import NextTokenDivergence


@dataclass(frozen=True, slots=True)
class ReferenceStates:
    """What the divergence reads of a frozen model.

    Attributes:
        hidden: (B, T, H) the states that predict each scored token, aligned to tokens, without gradient.
        logps: (n, H) of them -> (n, V) log-probs of the next token, without gradient.
    """

    hidden: Tensor
    logps: Callable[[Tensor], Tensor]


def head_logps(head: torch.nn.Module, logit_map: LogitMap) -> Callable[[Tensor], Tensor]:
    """(n, H) -> (n, V) log-probs by a head, in float32 at least. Of an adapted head those without its adapter."""
    if isinstance(head, LoraLayer):
        head = head.base_layer
    elif isinstance(head, ModulesToSaveWrapper):
        head = head.original_module

    gathered: list[Callable[[Tensor], Tensor]] = []

    @torch.no_grad()
    def logps(hidden: Tensor) -> Tensor:
        if not gathered:
            gathered.append(_gathered(head))
        return _logps(gathered[0], hidden, logit_map)

    return logps


def _gathered(head: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The head with all its weights. ZeRO-3 gathers them in each call of it; FSDP2 does not, so once here."""
    if not isinstance(head, torch.nn.Linear) or not isinstance(head.weight, DTensor):
        return head
    weight, bias = (None if part is None else part.full_tensor() for part in (head.weight, head.bias))
    return lambda hidden: torch.nn.functional.linear(hidden, weight, bias)


def _logps(head: Callable[[Tensor], Tensor], hidden: Tensor, logit_map: LogitMap) -> Tensor:
    raw = head(hidden)
    return logit_map(raw.to(torch.promote_types(raw.dtype, torch.float32))).log_softmax(-1)


def full_divergence(
    head: torch.nn.Module,
    hidden: Tensor,
    logit_map: LogitMap,
    reference: Callable[[Tensor], Tensor],
    reference_hidden: Tensor,
    divergence: NextTokenDivergence,
) -> Tensor:
    """(N,) divergences in nats, with gradient to the policy.

    Where the two models' embeddings have different numbers of rows, which padding of the same vocabulary leads to, both
    distributions are those over the rows that both have.

    Args:
        head: the policy's, hidden states (n, H) to logits (n, V).
        hidden: (N, H) of the policy.
        logit_map: of the policy.
        reference: as `ReferenceStates.logps`.
        reference_hidden: (N, H') of the reference, for the same tokens.
        divergence: of the two distributions.

    Call on all ranks.
    """

    linear = _gathered(head)

    def tile(own: Tensor, other: Tensor) -> Tensor:
        logps, theirs = _logps(linear, own, logit_map), reference(other)
        if logps.shape != theirs.shape:
            common = min(logps.shape[-1], theirs.shape[-1])
            logps, theirs = logps[:, :common].log_softmax(-1), theirs[:, :common].log_softmax(-1)
        return divergence(logps, theirs)

    width = getattr(head, "out_features", None) or hidden.shape[-1]
    rows = tile_rows(width, torch.float32, hidden.device)
    starts = range(0, rows * _tiles_of_all_ranks(len(hidden), rows, hidden.device), rows)
    tiles = [(hidden[start : start + rows], reference_hidden[start : start + rows]) for start in starts]
    return torch.cat([checkpoint(tile, *pair, use_reentrant=False) for pair in tiles])


def _tiles_of_all_ranks(n: int, rows: int, device: torch.device) -> int:
    """Tiles of the rank with the most. To call a sharded head is a matter of all ranks, so others add empty ones."""
    tiles = max(-(-n // rows), 1)
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return tiles
    most = torch.tensor(tiles, device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most)
