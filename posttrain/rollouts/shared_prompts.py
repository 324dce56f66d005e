"""Reading prompts into a cache: what several prompts of a batch begin with is computed once.

Completions that go on from different prefixes of one problem, texts of a search, chats under one system prompt and
questions behind the same examples begin alike. `plan` chooses which prompts are read from their first token and which
go on from the cache of another one; `read` does it and leaves the cache that reading each prompt whole would leave.
Prior art: RadixAttention (arXiv 2312.07104), vLLM's automatic prefix caching.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from posttrain.models.shared_prefix import Costs
from posttrain.models.sharing import sharing_obstacle

PASS_FLOPS = {"cpu": 1e8, "cuda": 5e10}
"""What one more forward pass costs per layer beside its arithmetic, copies of its cache included, in FLOPs that run in
the same time. CPU: measured with hidden sizes 128 and 256, where 100 to 170 shared tokens pay for it; CUDA: an estimate
from launch times."""

SHORTEST = tuple(8 << step for step in range(10))
"""Shared beginnings shorter than this are not used: the candidates that `plan` tries."""

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A prompt within a pass: its tokens from `shared` on, behind the first `shared` ones of `parent`, which an earlier
    pass has read; from the first token on where it has no parent."""

    prompt: int
    parent: int | None = None
    shared: int = 0


PromptPasses = tuple[tuple[PromptPart, ...], ...]
"""The passes in turn. Every prompt stands in one of them, its parent in an earlier one."""


def plan(prompts: Prompts, costs: Costs, each_pass: float, *, widest: int | None = None) -> PromptPasses:
    """The cheapest reading of some prompts by counted tokens, pairs and passes. One pass where sharing does not pay.

    Args:
        costs: of a layer.
        each_pass: FLOPs that a pass costs beside its arithmetic, per layer.
        widest: most columns that a cache may have (a sliding window forgets what is further back); None for any.
    """
    best: PromptPasses = (tuple(PromptPart(prompt) for prompt in range(len(prompts))),)
    common = _common(prompts)
    longest = int(common.max(initial=0))
    cheapest = _cost(best, prompts, costs, each_pass)
    for shortest in SHORTEST:
        if shortest > longest:
            break
        way = _forest(prompts, common, shortest, costs.token, each_pass)
        if widest is not None and max(map(sum, _widths(way, prompts))) > widest:
            continue
        cost = _cost(way, prompts, costs, each_pass)
        if cost < cheapest:
            best, cheapest = way, cost
    return best


def plan_for(model: PreTrainedModel, prompts: Prompts) -> PromptPasses:
    """`plan` for a model and the device it is on. Models that are not tested to share read every prompt whole."""
    layers = DynamicCache(config=model.config).layers
    # A state that is no list of tokens cannot be cut at one.
    cuttable = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if sharing_obstacle(model) is not None or not cuttable:
        return (tuple(PromptPart(prompt) for prompt in range(len(prompts))),)
    windows = [layer.sliding_window - 1 for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    return plan(prompts, *_costs(model), widest=min(windows, default=None))


def _costs(model: PreTrainedModel) -> tuple[Costs, float]:
    """Of a layer, and of a pass per layer."""
    each_pass = PASS_FLOPS.get(model.device.type, PASS_FLOPS["cuda"])
    return Costs.of(model.config.get_text_config(), model.device), each_pass


def reading_order(model: PreTrainedModel, prompts: Prompts, size: int, sampled: int) -> list[int]:
    """The order in which prompts are read and completed, `size` at once: by length, so that little is padded, or those
    that begin alike together, whichever takes fewer FLOPs.

    Args:
        sampled: tokens that are sampled for each prompt, over all its completions.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts) <= size:
        return by_length
    costs, each_pass = _costs(model)

    def cost(order: list[int]) -> float:
        total = 0.0
        for batch in ([prompts[i] for i in order[start : start + size]] for start in range(0, len(order), size)):
            total += _cost(plan_for(model, batch), batch, costs, each_pass)
            total += costs.pair * max(map(len, batch)) * len(batch) * sampled
        return total

    return min(by_length, sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])), key=cost)


def tokens_read(passes: PromptPasses, prompts: Prompts) -> int:
    """Prompt tokens that the passes compute, without padding."""
    return sum(len(prompts[part.prompt]) - part.shared for parts in passes for part in parts)


def _common(prompts: Prompts) -> np.ndarray:
    """(N, N): tokens that two prompts begin with alike; 0 on the diagonal."""
    texts = [tuple(prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    # In this order, what two prompts share is the least that neighbours between them share.
    neighbours = np.array([_alike(texts[i], texts[j]) for i, j in zip(order, order[1:], strict=False)], dtype=np.int64)
    common = np.zeros((len(texts), len(texts)), dtype=np.int64)
    for place, i in enumerate(order[:-1]):
        common[i, order[place + 1 :]] = np.minimum.accumulate(neighbours[place:])
    return np.maximum(common, common.T)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    return next(i for i in range(n) if one[i] != other[i])


def _forest(prompts: Prompts, common: np.ndarray, shortest: int, each_token: float, each_pass: float) -> PromptPasses:
    """The longest prompts first, each behind the one before it that has most in common with it.

    Of prompts that begin with each other only the longest is read whole. Of the others the last token is read, since
    its logits are wanted, in one pass at the end.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    levels = np.full(len(prompts), -1)
    passes: list[list[PromptPart]] = []
    contained: list[PromptPart] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        shared = np.where(levels >= 0, np.minimum(common[i], lengths[i] - 1), -1)
        # The earliest pass among those with about as much in common: fewer passes.
        most = int(shared.max())
        enough = most if most == lengths[i] - 1 else max(most - shortest, min(most, shortest))
        parent = int(np.lexsort((-shared, np.where(shared >= enough, levels, len(levels))))[0])
        if shared[parent] < shortest:
            level, part = 0, PromptPart(i)
        else:
            level, part = int(levels[parent]) + 1, PromptPart(i, parent, int(shared[parent]))
        levels[i] = level
        if level and part.shared == lengths[i] - 1:
            contained.append(part)
            continue
        if level == len(passes):
            passes.append([])
        passes[level].append(part)
    found = [batch for parts in passes for batch in _alike_wide(parts, lengths, each_token, each_pass)]
    return tuple(tuple(parts) for parts in (*found, contained) if parts)


def _alike_wide(
    parts: Sequence[PromptPart], lengths: np.ndarray, each_token: float, each_pass: float
) -> Iterator[list[PromptPart]]:
    """Parts padded together as long as that is cheaper than one pass more."""
    batch: list[PromptPart] = []
    for part in sorted(parts, key=lambda part: part.shared - lengths[part.prompt]):
        own = lengths[part.prompt] - part.shared
        if batch and (lengths[batch[0].prompt] - batch[0].shared - own) * each_token > each_pass:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _widths(passes: PromptPasses, prompts: Prompts) -> list[tuple[int, int]]:
    """Of each pass: columns behind which it reads, and columns that it reads."""
    return [
        (max(part.shared for part in parts), max(len(prompts[part.prompt]) - part.shared for part in parts))
        for parts in passes
    ]


def _cost(passes: PromptPasses, prompts: Prompts, costs: Costs, each_pass: float) -> float:
    total = 0.0
    for parts, (past, width) in zip(passes, _widths(passes, prompts), strict=True):
        total += each_pass + len(parts) * width * (costs.token + costs.pair * (past + width))
    return total


# ---------------------------------------------------------------------------------------------------------- the passes


@dataclass(frozen=True, slots=True)
class _Held:
    """A prompt that was read: its row and columns in the cache of `rows` x `width` tokens that its pass left."""

    cache: DynamicCache
    rows: int
    width: int
    row: int
    columns: Tensor


def read(model: PreTrainedModel, prompts: Prompts, pad_id: int) -> tuple[Tensor, DynamicCache, Tensor]:
    """Read prompts. Call without gradients.

    Returns:
        Logits (N, V) behind each prompt, the cache of the prompts, padded on the left, and its (N, T) attention mask.
    """
    held: dict[int, _Held] = {}
    logits: dict[int, Tensor] = {}
    passes = plan_for(model, prompts)
    for parts in passes:
        rests = [prompts[part.prompt][part.shared :] for part in parts]
        ids, attention = _left_padded(rests, pad_id, model.device)
        cache = DynamicCache(config=model.config)
        if parts[0].parent is not None:
            cache, before = _beginnings(model, [(held[part.parent], part.shared) for part in parts])
            attention = torch.cat([before, attention], dim=1)
        places = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :]
        own = go_on(model, ids, attention, places, cache)
        if len(passes) == 1:
            return own, cache, attention
        real = attention.bool().cpu()
        for row, part in enumerate(parts):
            held[part.prompt] = _Held(cache, real.size(0), real.size(1), row, real[row].nonzero().squeeze(1))
            logits[part.prompt] = own[row]
    everything = range(len(prompts))
    cache, attention = _beginnings(model, [(held[prompt], len(prompts[prompt])) for prompt in everything])
    return torch.stack([logits[prompt] for prompt in everything]), cache, attention


def go_on(model: PreTrainedModel, ids: Tensor, attention: Tensor, places: Tensor, cache: Cache) -> Tensor:
    """Logits (N, V) behind the last of some tokens.

    Args:
        ids, places: (N, n) the tokens and their positions.
        attention: (N, T) of all columns of the cache, these tokens included.
        cache: of what stands before them; it takes them in.
    """
    kind: Any = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    known = _parameters(kind)
    arguments = {"attention_mask": attention, "position_ids": places, "logits_to_keep": 1}
    arguments = {name: value for name, value in arguments.items() if name in known}
    if "cache_params" in known:  # of state-space models, which take a mask of the tokens of the pass
        arguments |= {"cache_params": cache, "attention_mask": attention[:, -ids.size(1) :]}
    else:
        arguments["past_key_values"] = cache
    return model(input_ids=ids, use_cache=True, **arguments).logits[:, -1]


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _left_padded(rows: Prompts, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (n, width)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention = torch.zeros((len(rows), width), dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, width - len(own) :] = torch.as_tensor(own)
        attention[row, width - len(own) :] = 1
    return ids.to(device), attention.to(device)


def _beginnings(model: PreTrainedModel, wanted: Sequence[tuple[_Held, int]]) -> tuple[DynamicCache, Tensor]:
    """A cache of copies of the first tokens of some prompts, padded on the left, and its attention mask.

    Args:
        wanted: prompts that were read, and how many tokens of each.
    """
    width, device = max(n for _, n in wanted), model.device
    first: dict[int, int] = {}  # token of a cache among the tokens of all
    caches: list[DynamicCache] = []
    tokens = 0
    for one, _ in wanted:
        if id(one.cache) not in first:
            first[id(one.cache)] = tokens
            caches.append(one.cache)
            tokens += one.rows * one.width
    rows = torch.tensor([first[id(one.cache)] + one.row * one.width for one, _ in wanted], device=device)
    widths = torch.tensor([one.width for one, _ in wanted], device=device)
    columns, attention = (torch.zeros(len(wanted), width, dtype=torch.long) for _ in range(2))
    for place, (one, n) in enumerate(wanted):
        columns[place, width - n :] = one.columns[:n]
        attention[place, width - n :] = 1
    columns, attention = columns.to(device), attention.to(device)
    cache = DynamicCache(config=model.config)
    for number in range(len(caches[0].layers)):
        layers = [source.layers[number] for source in caches]
        heads = torch.arange(layers[0].keys.size(1), device=device)
        # A layer keeps (row, head, column, channel).
        places = (rows * len(heads))[:, None, None] + heads[:, None] * widths[:, None, None] + columns[:, None]
        keys, values = (
            (parts[0] if len(parts) == 1 else torch.cat(parts))
            .index_select(0, places.flatten())
            .unflatten(0, places.shape)
            for parts in ([getattr(layer, name).flatten(0, 2) for layer in layers] for name in ("keys", "values"))
        )
        cache.update(keys, values, number)
    return cache, attention
