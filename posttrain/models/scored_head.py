"""The LM head for scored tokens only, in tiles: log-probs, entropies and top-1 without (N, V) logits in memory.

Prior art: cut cross-entropy (arXiv 2411.09009), the Liger kernel (2410.10989), TRL's fused head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from posttrain.config.memory import HEAD_CACHE_BYTES as CACHE_BYTES
from posttrain.config.memory import HEAD_TILE_BYTES as TILE_BYTES
from posttrain.config.memory import WORKING_COPIES

BLOCK_ROWS = 16
"""Rows of a tile between two passes over them: small enough for the CPU's cache."""


class Scores(NamedTuple):
    """Of N tokens: log-probs with gradient; entropies in nats and 0/1 top-1, without gradient, or None."""

    logps: Tensor
    entropies: Tensor | None
    top1: Tensor | None


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What happens to `hidden @ weight.T` before the softmax: softcap * tanh(x * scale / softcap) / temperature."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, temperature: float) -> LogitMap:
        """As the model family does it, read from its text config."""
        multipliers = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        found = (getattr(config, name, None) for name in multipliers)
        scale = next((value for value in found if value is not None), None)
        divisor = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
        if scale is None and divisor is not None:
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        return cls(temperature, 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None))

    @property
    def factor(self) -> float:
        """What a logit within the linear range is multiplied by."""
        return self.scale / self.temperature

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits as the softmax sees them; the argument itself if nothing changes."""
        if self.softcap is not None:
            return torch.tanh(raw * (self.scale / self.softcap)) * (self.softcap / self.temperature)
        return raw if self.factor == 1.0 else raw * self.factor

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative by the raw logits over `factor`, from the mapped ones; None if it is 1."""
        if self.softcap is None:
            return None
        return 1 - (logits * (self.temperature / self.softcap)) ** 2


@dataclass(frozen=True, slots=True)
class _Request:
    """What a call of the head is asked for beside hidden states (N, H)."""

    targets: Tensor
    logit_map: LogitMap
    entropy: bool
    top1: bool


def score(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, logit_map: LogitMap, *, entropy: bool, top1: bool
) -> Scores:
    """Scores of `targets` (N,) given `hidden` (N, H), the hidden states that predict them.

    `head` is called as a module, so that hooks which gather its weights (ZeRO-3) do so in forward and backward.
    """
    request = _Request(targets, logit_map, entropy, top1)
    patched = head.__dict__.get("forward")
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:  # an adapter on the head, say
        return _score_by_calls(head, hidden, request)
    if patched is None:
        head.forward = MethodType(_linear_or_scores, head)
    elif getattr(patched, "__func__", None) is not _linear_or_scores:
        return _score_by_calls(head, hidden, request)
    return Scores(*head(hidden, request=request))


def _linear_or_scores(self: torch.nn.Linear, input: Tensor, request: _Request | None = None) -> Any:
    """The forward of a `Linear` that can also score."""
    if request is None:
        return type(self).forward(self, input)
    weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
    return _TiledHead.apply(input, weight, request, torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------------- any head


def _score_by_calls(head: torch.nn.Module, hidden: Tensor, request: _Request) -> Scores:
    """Tile by tile through the head itself; the backward calls it again."""

    def tile(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw = head(hidden)
        logps = request.logit_map(raw.to(torch.promote_types(raw.dtype, torch.float32))).log_softmax(-1)
        with torch.no_grad():
            entropies = -(logps.exp() * logps).sum(-1)
            top1 = (logps.argmax(-1) == targets).to(logps.dtype)
        return logps.gather(-1, targets[:, None]).squeeze(-1), entropies, top1

    width = getattr(head, "out_features", None) or hidden.shape[-1]
    rows = tile_rows(width, torch.float32, hidden.device)
    tiles = [
        checkpoint(tile, hidden[start : start + rows], request.targets[start : start + rows], use_reentrant=False)
        for start in range(0, max(len(hidden), 1), rows)
    ]
    logps, entropies, top1 = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    return Scores(logps, entropies if request.entropy else None, top1 if request.top1 else None)


# -------------------------------------------------------------------------------------------------- a linear head


def tile_rows(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a tile, by the budget of the device."""
    per_logit = dtype.itemsize
    if device.type != "cpu":  # where all rows of a tile are worked on at once
        per_logit += WORKING_COPIES * torch.promote_types(dtype, torch.float32).itemsize
    return max(TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (width * per_logit), BLOCK_ROWS)


def blocks(n: int, device: torch.device) -> list[slice]:
    """Rows of a tile, a few at a time on the CPU, all at once elsewhere."""
    step = BLOCK_ROWS if device.type == "cpu" else max(n, 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


class _TiledHead(torch.autograd.Function):
    """log p(target) = z_target - log sum exp z, with z the mapped logits.

    d log p / d raw_j = factor * slope_j * (1[j = target] - p_j). With g the gradient that arrives at log p, that of the
    hidden state is g * factor * (slope_target weight_target - (slope * p) weight), and the weight's is like it: factor
    and g go to the small operands, so a tile is only turned into slope * p.

    With a frozen weight the gradient is g times something known in the forward, and nothing is computed twice.
    Otherwise tiles of logits are kept up to `CACHE_BYTES`, and computed again beyond.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, request: _Request, grad_enabled: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        device, (n, vocab) = hidden.device, (len(hidden), len(weight))
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        logps, lse = (torch.empty(n, dtype=exact, device=device) for _ in range(2))
        entropies, top1 = (logps.new_empty(n) if asked else None for asked in (request.entropy, request.top1))
        frozen = grad_enabled and not ctx.needs_input_grad[1] and ctx.needs_input_grad[0]
        unit = torch.empty(hidden.shape, dtype=exact, device=device) if frozen else None
        rows = min(tile_rows(vocab, dtype, device), max(n, 1))
        keep = kept_tiles(n, rows, vocab, dtype, CACHE_BYTES) if grad_enabled and ctx.needs_input_grad[1] else 0
        ctx.hidden_dtype = hidden.dtype
        hidden, cast = hidden.to(dtype), weight.to(dtype)
        buffer = torch.empty(rows, vocab, dtype=dtype, device=device)
        tiles = []
        for number, start in enumerate(range(0, n, rows)):
            inside = slice(start, min(start + rows, n))
            raw = (torch.empty_like(buffer) if number < keep else buffer)[: inside.stop - start]
            torch.mm(hidden[inside], cast.t(), out=raw)
            outputs = [None if x is None else x[inside] for x in (logps, lse, entropies, top1)]
            score_tile(raw, request.targets[inside], request.logit_map, *outputs)
            if number < keep:
                tiles.append(raw)
            if unit is not None:
                unit[inside] = _unit_gradient(raw, request.targets[inside], lse[inside], cast, request.logit_map)
        ctx.save_for_backward(hidden if unit is None else None, weight, request.targets, lse, unit, *tiles)
        ctx.logit_map, ctx.dtype, ctx.rows = request.logit_map, dtype, rows
        ctx.mark_non_differentiable(*(x for x in (entropies, top1) if x is not None))
        return logps, entropies, top1

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, unit, *tiles = ctx.saved_tensors
        if unit is not None:
            return (unit * upstream[:, None]).to(ctx.hidden_dtype), None, None, None
        found = gradients(
            upstream, hidden, weight, targets, lse, ctx.logit_map, ctx.rows, tiles, weight_too=ctx.needs_input_grad[1]
        )
        return found[0].to(ctx.hidden_dtype), found[1], None, None


def gradients(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    logit_map: LogitMap,
    rows: int,
    tiles: Sequence[Tensor],
    *,
    weight_too: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients by hidden states (N, H) and by the weight (V, H), from those by log-probs (N,).

    Args:
        hidden: (N, H), of the type that products are computed in.
        lse: (N,) log-normalisers of the mapped logits.
        rows: of a tile.
        tiles: raw logits of the first ones; the others are computed again.
    """
    exact, dtype = lse.dtype, hidden.dtype
    cast, scaled = weight.to(dtype), upstream.to(exact)[:, None] * logit_map.factor
    grad_hidden = torch.empty(hidden.shape, dtype=exact, device=hidden.device)
    grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if weight_too else None
    buffer = torch.empty(rows, len(weight), dtype=exact, device=hidden.device)
    for number, start in enumerate(range(0, len(hidden), rows)):
        inside = slice(start, min(start + rows, len(hidden)))
        if number < len(tiles):
            raw = tiles[number]
        elif dtype == exact:  # `_weights` goes over it in place: one tile less in memory at the step's peak
            raw = torch.mm(hidden[inside], cast.t(), out=buffer[: inside.stop - start])
        else:
            raw = hidden[inside] @ cast.t()
        weights, at_target = _weights(raw, targets[inside], lse[inside], logit_map, buffer)
        coefficients = scaled[inside] * at_target
        grad_hidden[inside] = coefficients * cast[targets[inside]] - scaled[inside] * (weights.to(dtype) @ cast)
        if grad_weight is not None:
            own = hidden[inside].to(exact)
            grad_weight.addmm_(weights.t(), own * -scaled[inside])
            grad_weight.index_add_(0, targets[inside], own * coefficients)
    return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def kept_tiles(n: int, rows: int, vocab: int, dtype: torch.dtype, budget: int) -> int:
    """How many tiles of n rows fit into a budget in bytes; a backward pass need not compute them again."""
    return min(budget // (rows * vocab * dtype.itemsize), -(-n // rows))


def score_tile(
    raw: Tensor,
    targets: Tensor,
    logit_map: LogitMap,
    logps: Tensor,
    lse: Tensor,
    entropies: Tensor | None,
    top1: Tensor | None,
) -> None:
    """Write the scores of a tile of raw logits (n, V) into the last four, (n,) each."""
    for block in blocks(len(raw), raw.device):
        logits = logit_map(raw[block].to(lse.dtype))
        probabilities = logits.softmax(-1)
        # PyTorch's softmax is several times faster than its logsumexp. The largest probability is 1 / sum exp(z - max).
        lse[block] = logits.amax(-1) - probabilities.amax(-1).log()
        logps[block] = logits.gather(-1, targets[block, None]).squeeze(-1) - lse[block]
        if entropies is not None:
            entropies[block] = lse[block] - torch.bmm(probabilities[:, None], logits[:, :, None]).flatten()
        if top1 is not None:
            top1[block] = (logits.argmax(-1) == targets[block]).to(top1.dtype)


def _weights(
    raw: Tensor, targets: Tensor, lse: Tensor, logit_map: LogitMap, buffer: Tensor
) -> tuple[Tensor, Tensor | float]:
    """slope * p of a tile (n, V), written into `buffer`, and the slope at the targets, (n, 1) or 1.

    `buffer` may hold `raw` itself.
    """
    weights, at_target = buffer[: len(raw)], []
    for block in blocks(len(raw), raw.device):
        logits = logit_map(raw[block].to(lse.dtype))
        torch.sub(logits, lse[block, None], out=weights[block]).exp_()
        slope = logit_map.slope(logits)
        if slope is not None:
            weights[block].mul_(slope)
            at_target.append(slope.gather(-1, targets[block, None]))
    return weights, torch.cat(at_target) if at_target else 1.0


def _unit_gradient(raw: Tensor, targets: Tensor, lse: Tensor, cast: Tensor, logit_map: LogitMap) -> Tensor:
    """d log p / d hidden (n, H)."""
    buffer = torch.empty(raw.shape, dtype=lse.dtype, device=raw.device)
    weights, at_target = _weights(raw, targets, lse, logit_map, buffer)
    return logit_map.factor * (at_target * cast[targets] - weights.to(cast.dtype) @ cast)
