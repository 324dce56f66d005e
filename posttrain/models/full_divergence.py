"""Divergence of the policy's next-token distribution from a frozen model's, over the whole vocabulary, without (N, V)
in memory.

The estimate from taken tokens (k3) cannot see where probability goes that no trace holds. This sum can: it costs a
forward pass of the frozen model in every step, and a product with both heads, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from posttrain.config.memory import DIVERGENCE_CACHE_BYTES as CACHE_BYTES
from posttrain.models.scored_head import LogitMap, Scores, blocks, gradients, kept_tiles, score, score_tile, tile_rows
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


def scores_and_divergence(
    head: torch.nn.Module,
    hidden: Tensor,
    targets: Tensor,
    logit_map: LogitMap,
    reference: ReferenceStates,
    divergence: NextTokenDivergence,
    *,
    entropy: bool,
    top1: bool,
) -> tuple[Scores, Tensor]:
    """As `scored_head.score`, and (N,) divergences in nats, both with gradient to the policy.

    Where the two models' embeddings have different numbers of rows, which padding of the same vocabulary leads to, both
    distributions are those over the rows that both have.

    Args:
        head: the policy's, hidden states (n, H) to logits (n, V).
        hidden: (N, H) of the policy, which predict `targets` (N,).
        logit_map: of the policy.
        reference: its hidden states (N, H') are of the same tokens.
        divergence: of the two distributions.

    Call on all ranks.
    """
    width = getattr(head, "out_features", None) or hidden.shape[-1]
    rows = tile_rows(width, torch.float32, hidden.device)
    if isinstance(head, torch.nn.Linear) and head.bias is None and not hasattr(head.weight, "ds_id"):
        weight = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight
        request = _Request(targets, logit_map, reference.logps, divergence, rows, entropy, top1)
        found = _TiledDivergence.apply(hidden, weight, reference.hidden, request, torch.is_grad_enabled())
        return Scores(*found[1:]), found[0]

    linear = _gathered(head)

    def tile(own: Tensor, other: Tensor) -> Tensor:
        return _divergences(linear(own), reference.logps(other), logit_map, divergence)

    scores = score(head, hidden, targets, logit_map, entropy=entropy, top1=top1)
    starts = range(0, rows * _tiles_of_all_ranks(len(hidden), rows, hidden.device), rows)
    tiles = [(hidden[start : start + rows], reference.hidden[start : start + rows]) for start in starts]
    return scores, torch.cat([checkpoint(tile, *pair, use_reentrant=False) for pair in tiles])


def _divergences(raw: Tensor, theirs: Tensor, logit_map: LogitMap, divergence: NextTokenDivergence) -> Tensor:
    """(n,) of raw logits (n, V) and the reference's log-probs (n, V')."""
    logps = logit_map(raw.to(torch.promote_types(raw.dtype, torch.float32))).log_softmax(-1)
    if logps.shape != theirs.shape:
        common = min(logps.shape[-1], theirs.shape[-1])
        logps, theirs = logps[:, :common].log_softmax(-1), theirs[:, :common].log_softmax(-1)
    return divergence(logps, theirs)


@dataclass(frozen=True, slots=True)
class _Request:
    """What a pass over a linear head is asked for beside the hidden states; tiles have `rows` rows."""

    targets: Tensor
    logit_map: LogitMap
    reference: Callable[[Tensor], Tensor]
    divergence: NextTokenDivergence
    rows: int
    entropy: bool
    top1: bool

    def tile(self, raw: Tensor, theirs: Tensor, found: Tensor, slopes: Tensor | None) -> None:
        """Write the divergences of a tile of raw logits (n, V) into `found` (n,), and their gradients by those into
        `slopes` (n, V), which may be `raw` itself. The graph is that of a few rows, and gone with them."""
        for block in blocks(len(raw), raw.device):
            with torch.set_grad_enabled(slopes is not None):
                logits = raw[block].detach().requires_grad_(slopes is not None)
                values = _divergences(logits, theirs[block], self.logit_map, self.divergence)
            found[block] = values.detach()
            if slopes is not None:
                slopes[block] = torch.autograd.grad(values, logits, torch.ones_like(values))[0]


class _TiledDivergence(torch.autograd.Function):
    """Divergences (N,) and scores through a linear head, each tile computed once.

    The gradient g of a divergence by its raw logits is known in the forward pass. That of the hidden state, g weight,
    is formed there and later multiplied by what arrives. The weight's, a sum over tokens of g times hidden times what
    arrives, needs g in the backward pass: tiles of it are kept up to `CACHE_BYTES`, and computed again beyond. With a
    frozen head nothing is. Where the loss reads log-probs too, their gradient takes one more product with the head.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, theirs: Tensor, request: _Request, grad_enabled: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        device, n = hidden.device, len(hidden)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        to_hidden, to_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        ctx.hidden_dtype, ctx.request = hidden.dtype, request
        hidden, cast = hidden.to(dtype), weight.to(dtype)
        found, logps, lse = (torch.empty(n, dtype=exact, device=device) for _ in range(3))
        entropies, top1 = (logps.new_empty(n) if asked else None for asked in (request.entropy, request.top1))
        unit = torch.empty(hidden.shape, dtype=exact, device=device) if to_hidden else None
        rows = request.rows
        keep = kept_tiles(n, rows, len(weight), exact, CACHE_BYTES) if to_weight else 0
        tiles = []
        for number, start in enumerate(range(0, max(n, 1), rows)):
            inside = slice(start, min(start + rows, n))
            raw = hidden[inside] @ cast.t()
            outputs = [None if x is None else x[inside] for x in (logps, lse, entropies, top1)]
            score_tile(raw, request.targets[inside], request.logit_map, *outputs)
            slopes = None
            if to_hidden or to_weight:
                slopes = raw if dtype == exact else raw.to(exact)
            request.tile(raw, request.reference(theirs[inside]), found[inside], slopes)
            if slopes is None:
                continue
            if unit is not None:
                unit[inside] = slopes.to(dtype) @ cast
            if number < keep:
                tiles.append(slopes)
        ctx.save_for_backward(hidden, weight, theirs, lse, unit, *tiles)
        ctx.mark_non_differentiable(*(x for x in (entropies, top1) if x is not None))
        ctx.set_materialize_grads(False)
        return found, logps, entropies, top1

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, of_logps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, theirs, lse, unit, *tiles = ctx.saved_tensors
        request, weight_too = ctx.request, ctx.needs_input_grad[1]
        to_hidden = to_weight = None
        if of_logps is not None:
            shared = request.targets, lse, request.logit_map, request.rows
            to_hidden, to_weight = gradients(of_logps, hidden, weight, *shared, (), weight_too=weight_too)
        if upstream is not None:
            if unit is not None:
                own = unit * upstream[:, None]
                to_hidden = own if to_hidden is None else to_hidden + own
            if weight_too:
                own = _weight_gradient(hidden, weight, theirs, upstream[:, None], request, tiles)
                to_weight = own if to_weight is None else to_weight + own
        return None if to_hidden is None else to_hidden.to(ctx.hidden_dtype), to_weight, None, None, None


def _weight_gradient(
    hidden: Tensor, weight: Tensor, theirs: Tensor, upstream: Tensor, request: _Request, tiles: list[Tensor]
) -> Tensor:
    """(V, H), the sum over tokens of what arrives (N, 1) times the slope of the logits times the hidden state."""
    exact = upstream.dtype
    cast, found = weight.to(hidden.dtype), torch.zeros(weight.shape, dtype=exact, device=weight.device)
    for number, start in enumerate(range(0, len(hidden), request.rows)):
        inside = slice(start, min(start + request.rows, len(hidden)))
        if number < len(tiles):
            slopes = tiles[number]
        else:
            raw = hidden[inside] @ cast.t()
            slopes = raw if raw.dtype == exact else raw.to(exact)
            request.tile(raw, request.reference(theirs[inside]), upstream.new_empty(len(raw)), slopes)
        found.addmm_(slopes.t(), hidden[inside].to(exact) * upstream[inside])
    return found.to(weight.dtype)


def _tiles_of_all_ranks(n: int, rows: int, device: torch.device) -> int:
    """Tiles of the rank with the most. To call a sharded head is a matter of all ranks, so others add empty ones."""
    tiles = max(-(-n // rows), 1)
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return tiles
    most = torch.tensor(tiles, device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most)
