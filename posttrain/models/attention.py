"""Attention that follows a `Layout`, registered with transformers under `NAME`; without a layout it is plain SDPA.

The layout comes as a keyword argument of the model's forward, not as global state: gradient checkpointing keeps it and
recomputes a layer with it. No mask of T x T is ever built.

Two ways, equal up to rounding:

- merged: causal attention within each segment, attention from all that is behind a segment to it, and these joined by
  their log-sum-exps. Keys and values that are shared are never copied. On the CPU, without a sliding window, where no
  token sees those behind it.
- concatenated: keys and values of all in front of those of each branch, through PyTorch's SDPA; on any device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from posttrain.models.shared_prefix import Cross, Layout, Padded, Segment

NAME = "shared_prefix"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def no_mask(device: torch.device) -> Tensor:
    """A mask that keeps transformers from building one: four-dimensional masks are passed on as they are."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def layout_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        query: (1, H, T, D) with a layout; key, value: (1, K, T, D) with H a multiple of K.
        sliding_window: keys further back than this are not seen, the query's own place counted.

    Returns:
        (1, T, H, D), and None for the weights.
    """
    if layout is None:
        more = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more, **kwargs)
    if dropout:
        raise ValueError("attention in a layout has no dropout")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None and sliding_window >= layout.longest:
        sliding_window = None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    mergeable = sliding_window is None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    mergeable = mergeable and layout.blocks is None
    if mergeable and flash_is_usable():
        return _Merged.apply(query, key, value, layout, scale)[None], None
    return _concatenated(query, key, value, layout, scale, sliding_window)[None], None


@functools.cache
def flash_is_usable() -> bool:
    """Whether PyTorch's CPU flash kernel, which is not public, takes grouped heads and gives right gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), (1, 4, 5, 8))
    query, key, value, upstream = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        repeated = [leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])]
        expected = scaled_dot_product_attention(repeated[0], repeated[1], repeated[2], is_causal=True)
        wanted = torch.autograd.grad(expected, leaves, upstream)
    try:
        out, lse = _flash(query, key, value, 0.0, True)
        found = _flash_backward(upstream, query, key, value, out, lse, 0.0, True)
    except (RuntimeError, TypeError):
        return False
    return torch.allclose(out, expected) and all(
        a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, wanted, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------ merged


def _side_by_side(x: Tensor, batch: Padded) -> Tensor:
    """(T, ...) -> (n, length, ...): the tokens of the batch's segments, padded."""
    return x[batch.tokens].reshape(batch.n, batch.length, *x.shape[1:])


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _real(x: Tensor, batch: Padded) -> Tensor:
    """(n, heads, length, ...) -> (K, heads, ...): the tokens that are no padding."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if batch.real is None else flat[batch.real]


def _prefixes(x: Tensor, cross: Cross) -> Tensor:
    """(T, heads, D) -> (n, heads, prefix, D), a view."""
    start, length = cross.prefix.start, cross.prefix.length
    return x[start : start + cross.n * length].unflatten(0, (cross.n, length)).transpose(1, 2)


def _branch_slice(cross: Cross) -> slice:
    return slice(cross.branches.start, cross.branches.start + cross.n * cross.branches.length)


def _branches(x: Tensor, cross: Cross) -> Tensor:
    """(T, heads, ...) -> (n, heads, branch tokens, ...), a view."""
    return x[_branch_slice(cross)].unflatten(0, (cross.n, cross.branches.length)).transpose(1, 2)


class _Merged(torch.autograd.Function):
    """With (o1, l1) and (o2, l2) outputs and log-sum-exps of two parts of the keys, the output over all keys is
    o1 exp(l1 - l) + o2 exp(l2 - l) with l = log(exp l1 + exp l2). Given the joint output and l, the flash backward of
    either part is its share of the gradient, so nothing is merged on the way back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        """query (T, H, D), key and value (T, K, D) -> (T, H, D)."""
        out = torch.empty(query.shape, dtype=query.dtype)
        lse = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for batch in (*layout.prefixes, *layout.branches):
            parts = (_heads_first(_side_by_side(x, batch)) for x in (query, key, value))
            own, own_lse = _flash(*parts, 0.0, True, scale=scale)
            out[batch.targets], lse[batch.targets] = _real(own, batch), _real(own_lse, batch)
        for cross in layout.crosses:
            to_prefix = _flash(
                _branches(query, cross), _prefixes(key, cross), _prefixes(value, cross), 0.0, False, scale=scale
            )
            other, other_lse = (x.transpose(1, 2).flatten(0, 1) for x in to_prefix)
            inside = _branch_slice(cross)
            joint = torch.logaddexp(lse[inside], other_lse)
            share = (other_lse - joint).exp_().unsqueeze(-1)
            out[inside] = torch.lerp(out[inside].to(lse.dtype), other.to(lse.dtype), share).to(out.dtype)
            lse[inside] = joint
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        saved, layout, scale = (upstream, query, key, value, out, lse), ctx.layout, ctx.scale
        grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        for batch in (*layout.prefixes, *layout.branches):
            parts = [_side_by_side(x, batch) for x in saved]
            if batch.padding is not None:
                parts[0].flatten(0, 1).index_fill_(0, batch.padding, 0)
            found = _flash_backward(*(_heads_first(x) for x in parts), 0.0, True, scale=scale)
            for grad, part in zip(grads, found, strict=True):
                grad[batch.targets] = _real(part, batch)
        for cross in layout.crosses:
            parts = [_branches(x, cross) for x in saved]
            parts[2:4] = _prefixes(key, cross), _prefixes(value, cross)
            found = _flash_backward(*parts, 0.0, False, scale=scale)
            _branches(grads[0], cross).add_(found[0])
            _prefixes(grads[1], cross).add_(found[1])
            _prefixes(grads[2], cross).add_(found[2])
        return *grads, None, None


# ------------------------------------------------------------------------------------------------------- concatenated


def _concatenated(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    """query (T, H, D), key and value (T, K, D) -> (T, H, D); differentiable by autograd."""
    copies = query.shape[1] // key.shape[1]
    if copies > 1:
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    for batch in layout.prefixes:
        parts = [_heads_first(_side_by_side(x, batch)) for x in (query, key, value)]
        mask = None
        if window is not None or layout.blocks is not None:
            mask = _seen(0, batch, (), layout.blocks, window, query.device)
        own = scaled_dot_product_attention(
            parts[0], parts[1], parts[2], attn_mask=mask, is_causal=mask is None, scale=scale
        )
        out = _put(out, batch, own)
    for path, batch in layout.branches_of:
        own_query = _heads_first(_side_by_side(query, batch))
        before = [torch.cat([x[s.start : s.start + s.length] for s in path]) for x in (key, value)]
        whole = [
            _heads_first(torch.cat([shared.expand(batch.n, -1, -1, -1), _side_by_side(x, batch)], dim=1))
            for shared, x in zip(before, (key, value), strict=True)
        ]
        mask = _seen(len(before[0]), batch, path, layout.blocks, window, query.device)
        out = _put(out, batch, scaled_dot_product_attention(own_query, whole[0], whole[1], attn_mask=mask, scale=scale))
    return out


def _put(out: Tensor, batch: Padded, found: Tensor) -> Tensor:
    targets = batch.targets
    if isinstance(targets, slice):
        targets = torch.arange(targets.start, targets.stop, device=out.device)
    return out.index_copy(0, targets, _real(found, batch).to(out.dtype))


def _seen(
    before: int,
    batch: Padded,
    path: tuple[Segment, ...],
    blocks: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """(length, before + length) or, with blocks, (n, 1, length, before + length): what the queries of a batch see.

    Args:
        before: tokens of the segments of `path`, which stand in front of the batch's.
    """
    queries = torch.arange(before, before + batch.length, device=device)[:, None]
    keys = torch.arange(before + batch.length, device=device)[None, :]
    seen = keys <= queries
    if blocks is not None:
        own = _side_by_side(blocks, batch).clone()
        if batch.padding is not None:
            own.view(-1)[batch.padding] = -1
        shared = torch.cat([blocks[s.start : s.start + s.length] for s in path]) if path else own.new_empty(0)
        every = torch.cat([shared.expand(batch.n, -1), own], dim=1)
        seen = (seen | ((own[:, :, None] == every[:, None, :]) & (own >= 0)[:, :, None]))[:, None]
    return seen if window is None else seen & (keys > queries - window)


AttentionInterface.register(NAME, layout_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
