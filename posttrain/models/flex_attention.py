"""FlexAttention that follows a `Layout`, registered with transformers under `NAME`.

Chosen by `model.attn_implementation: flex_attention`. Attention over a whole pass is one call with a block mask: keys
and values of a shared prefix are neither copied nor merged. PyTorch compiles it to Triton kernels on CUDA; on a CPU it
runs without being compiled, holds all T x T scores, and has no gradients.

Without a layout it is transformers' own FlexAttention on CUDA, and plain attention on a CPU: there theirs is compiled
to C++, which takes a compiler and tens of seconds, and PyTorch 2.13 makes code of some shapes that is none.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask, sdpa_mask

from posttrain.models.device import FLEX
from posttrain.models.shared_prefix import BLOCK, Group, Layout

NAME = "shared_prefix_flex"

CHOICE = FLEX
"""What `model.attn_implementation` says to choose it; transformers' own name of FlexAttention."""

RECOMPILE_LIMIT = 64
"""Variants that may be compiled: each dtype, shape of heads, with and without gradients, one block or several. Beyond
PyTorch's 8 it would refuse to go on."""

# On a CPU it is meant.
warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")


def flex_layout_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it.

    Args:
        query: (1, H, T, D) with a layout; key, value: (1, K, T, D) with H a multiple of K.
        softcap: scores become softcap * tanh(score / softcap).
        sliding_window: keys further back than this are not seen, the query's own place counted.

    Returns:
        (1, T, H, D), and None for the weights.
    """
    if layout is None:
        more = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **kwargs}
        if query.device.type != "cpu":
            return flex_attention_forward(module, query, key, value, attention_mask, softcap=softcap, **more)
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return _capped(query, key, value, attention_mask, scaling, softcap), None
    if dropout:
        raise ValueError("attention in a layout has no dropout")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = block_mask(layout, sliding_window, query.device)
    cap = None if softcap is None else _softcap(softcap)
    if query.device.type == "cpu":
        out = _call(query, key, value, cap, mask, scaling)
    else:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            out = _compiled()(query, key, value, cap, mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _call(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable | None, mask: BlockMask, scale: float | None
) -> Tensor:
    """A function of its own: what transformers compiles of theirs does not count towards its limit."""
    return flex_attention(query, key, value, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=True)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`fullgraph`, since what cannot be compiled would hold all T x T scores."""
    return torch.compile(_call, dynamic=True, fullgraph=True)


@functools.cache
def _softcap(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, cap: float) -> Tensor:
    """Plain attention with a soft cap, which SDPA does not have; (B, T, H, D)."""
    copies = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _mask(*, device: torch.device, allow_is_causal_skip: bool = True, **arguments: Any) -> BlockMask | Tensor:
    """What `flex_layout_attention` reads without a layout."""
    if torch.device(device).type != "cpu":
        return flex_attention_mask(device=device, **arguments)
    return sdpa_mask(device=device, allow_is_causal_skip=False, **arguments)


# -------------------------------------------------------------------------------------------------------- block masks


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """The mask of a layout; made once per window, then kept with the layout."""
    if window is not None and window >= layout.longest:
        window = None
    if window not in layout.masks:
        layout.masks[window] = _made(layout.groups, window, device)
    return layout.masks[window]


def _made(groups: Sequence[Group], window: int | None, device: torch.device) -> BlockMask:
    """Not by PyTorch's `create_block_mask`, which compares all T x T tokens unless it is compiled."""
    parts = [part for group in groups for part, _ in group.walk()]
    total = sum(part.segment.length for part in parts)
    own, last, position = (np.empty(total, dtype=np.int32) for _ in range(3))
    for number, part in enumerate(parts):
        segment = part.segment
        inside = slice(segment.start, segment.start + segment.length)
        own[inside], last[inside] = number, number + sum(1 for _ in part.walk()) - 1
        position[inside] = np.arange(part.before, part.before + segment.length)
    first = np.zeros_like(position) if window is None else position - np.int32(window - 1)
    own, last, position, first = (torch.from_numpy(x).to(device) for x in (own, last, position, first))

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Segments are numbered so that those behind one follow it.
        related = (own[key] <= own[query]) & (own[query] <= last[key])
        return related & (position[key] <= position[query]) & (position[key] >= first[query])

    some, full = _blocks(groups, total, window)
    ordered = [x.to(device) for dense in (some & ~full, full) for x in _ordered(dense)]
    return BlockMask.from_kv_blocks(*ordered, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(total, total))


def _blocks(groups: Sequence[Group], total: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) each: pairs of blocks of queries and keys in which some pair is seen, and in which every pair is."""
    n = -(-total // BLOCK)
    some, full = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    reach = total if window is None else window
    for group in groups:
        for part, path in group.walk():
            segment, before = part.segment, part.before
            stop = segment.start + segment.length
            if not segment.length:
                continue
            for block in range(segment.start // BLOCK, -(-stop // BLOCK)):
                first, last = max(segment.start, block * BLOCK), min(stop, (block + 1) * BLOCK) - 1
                # Keys from .. to that some query of the block sees, and those that every one sees.
                runs = [(max(segment.start, first - reach + 1), last, max(segment.start, last - reach + 1), first)]
                for shared in path:
                    start, end = shared.segment.start, shared.segment.start + shared.segment.length
                    within = before - shared.before - segment.start - reach + 1
                    widest, narrowest = (max(0, within + q) for q in (first, last))
                    runs.append((start + widest, end - 1, start + narrowest, end - 1))
                for some_from, some_to, all_from, all_to in runs:
                    if some_from <= some_to:
                        some[block, some_from // BLOCK : some_to // BLOCK + 1] = True
                    if last - first + 1 == BLOCK:
                        full[block, -(-all_from // BLOCK) : (all_to + 1) // BLOCK] = True
    return some, full


def _ordered(dense: np.ndarray) -> tuple[Tensor, Tensor]:
    """(1, 1, n) blocks of each row, and (1, 1, n, n) their columns, before all others."""
    counts = torch.from_numpy(dense.sum(1, dtype=np.int32))
    columns = torch.from_numpy(np.argsort(~dense, axis=1, kind="stable").astype(np.int32))
    return counts[None, None], columns[None, None]


AttentionInterface.register(NAME, flex_layout_attention)
AttentionMaskInterface.register(NAME, _mask)
