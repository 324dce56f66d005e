"""Which tokens a forward pass computes: shared beginnings once, no padding, nothing behind the last scored token.

Rows of a micro-batch are cut after the token that predicts their last scored one. Rows that begin with the same tokens
(a prompt, the first turns of an episode, scored or not) form a tree: what several of them share stands once in the
pass, and what goes on from there are its branches. Prior art: Prefix Grouper (arXiv 2506.05433), padding removal as in
verl.

Pure planning on the CPU; `models.attention` computes attention in a layout, `models.token_logps` runs the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

CALL_FLOPS = {"cpu": 3e6, "cuda": 5e9}
"""What one more attention call costs beside its arithmetic, in FLOPs that run in the same time. CPU: measured with
prompts of 1 to 64 tokens; CUDA: an estimate from launch times."""

MERGE_FLOPS = 100
"""What joining two parts of the attention costs per token and hidden channel, likewise."""

BLOCK = 128
"""Tokens of a block of FlexAttention's masks; a query is compared with all keys of a block if any of the block's is."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a forward pass costs per layer, in FLOPs: a token, a (query, key) pair, an attention call, a token of a
    branch beside what any token costs.

    Attributes:
        whole: how attention over a layout is one call, and nothing is merged: over blocks that have a pair to see, or
            over all pairs of the pass. None: calls for batches of segments.
    """

    token: float
    pair: float
    call: float
    merge: float
    whole: Literal["blocks", "all"] | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, device: torch.device, *, flex: bool = False) -> Costs:
        """The usual estimate for a decoder layer: 12 hidden² weights, 4 FLOPs per pair and attention channel.

        Args:
            flex: attention is FlexAttention, which computes all pairs where it is not compiled: on a CPU.
        """
        hidden = config.hidden_size
        call = CALL_FLOPS.get(device.type, CALL_FLOPS["cuda"])
        merge = 0.0 if flex else float(MERGE_FLOPS * hidden)
        whole: Literal["blocks", "all"] | None = ("all" if device.type == "cpu" else "blocks") if flex else None
        return cls(token=24.0 * hidden**2, pair=4.0 * hidden, call=call, merge=merge, whole=whole)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start .. start + length - 1 of the pass."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that follow each other, and the branches that go on from them; without any they are the end of a row.

    Attributes:
        before: tokens of its rows in front of the segment.
    """

    segment: Segment
    before: int
    branches: tuple[Group, ...]

    @property
    def rows(self) -> int:
        """Rows that hold the segment."""
        return sum(branch.rows for branch in self.branches) or 1

    def walk(self, path: tuple[Group, ...] = ()) -> Iterator[tuple[Group, tuple[Group, ...]]]:
        """This and everything behind it in the order of the pass, each with what stands in front of it, root first."""
        yield self, path
        for branch in self.branches:
            yield from branch.walk((*path, self))


@dataclass(frozen=True, slots=True)
class Padded:
    """Segments side by side as (n, length) tokens of the pass, for one causal attention call.

    Attributes:
        tokens: (n * length,) places in the pass; padding repeats a token of its own segment. A slice where the segments
            are equally long and follow each other.
        real: (K,) places among the n * length that are no padding; None if none is.
        padding: the other places; None if there is none.
    """

    n: int
    length: int
    tokens: slice | Tensor
    real: Tensor | None
    padding: Tensor | None

    @property
    def targets(self) -> slice | Tensor:
        """Places in the pass of the real tokens, in the order of `real`."""
        if self.real is None:
            return self.tokens
        assert not isinstance(self.tokens, slice)  # with padding they do not follow each other
        return self.tokens[self.real]


@dataclass(frozen=True, slots=True)
class Cross:
    """n shared segments of one length that follow each other, and as many runs of tokens behind them that attend to
    them."""

    n: int
    prefix: Segment
    branches: Segment


@dataclass(frozen=True, slots=True)
class Layout:
    """The attention pattern of a pass of T tokens: causal within each segment, and to all in front of it in its rows.

    Attributes:
        groups: the roots, which no other segment stands in front of.
        prefixes, branches: segments that are roots and those that are not, for causal calls.
        crosses: the calls from all that is behind a segment to it.
        branches_of: for each segment with branches what stands in front of these, root first, and they in one batch.
        blocks: (T,) tokens of one number from 0 on see each other whatever their order, as those of a picture do in
            some models; None where there are none.
        masks: FlexAttention's block masks by sliding window, made when a layer first asks for one.
    """

    groups: tuple[Group, ...]
    prefixes: tuple[Padded, ...]
    branches: tuple[Padded, ...]
    crosses: tuple[Cross, ...]
    branches_of: tuple[tuple[tuple[Segment, ...], Padded], ...]
    blocks: Tensor | None = None
    masks: dict[int | None, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(part.before + part.segment.length for group in self.groups for part, _ in group.walk())


@dataclass(frozen=True, slots=True)
class PackedPass:
    """One forward pass. N scored tokens, B rows of T tokens before planning.

    Attributes:
        source: places in the (B * T,) ids of the tokens to compute: (1, tokens) with a layout, else (rows, width).
        positions: (1, tokens) position ids with a layout; None for plain rows, which count from 0.
        predictors: (N,) places in the flattened pass whose hidden state predicts a scored token.
        targets: (N,) places in the (B * T,) ids of the scored tokens.
        layout: None for plain rows, whose right padding causal attention never sees.
    """

    source: Tensor
    positions: Tensor | None
    predictors: Tensor
    targets: Tensor
    layout: Layout | None


@dataclass(frozen=True, slots=True)
class _Row:
    """A row with scored tokens; `end` is the column of the last one, which is no input any more."""

    index: int
    end: int


@dataclass(frozen=True, slots=True)
class _Node:
    """Columns start .. end - 1 that all of these rows have in common; one row alone has no branches."""

    rows: list[_Row]
    start: int
    end: int
    branches: list[_Node] = field(default_factory=list)


def plan(ids: Tensor, mask: Tensor, costs: Costs, *, layouts: bool, device: torch.device) -> PackedPass:
    """The cheapest forward pass that gives the log-probs of all scored tokens.

    Args:
        ids: (B, T) right-padded rows, on the CPU.
        mask: (B, T) bool, True on scored tokens, on the CPU; `mask[:, 0]` is 0.
        layouts: whether the model's attention can follow a layout; else the pass is made of plain rows.
        device: where the plan's tensors go.
    """
    scored = (mask != 0).numpy()
    rows = [_Row(int(r), int(scored[r].nonzero()[0][-1])) for r in scored.any(1).nonzero()[0]]
    if not rows:  # one token, so that gradients are zero instead of missing
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return PackedPass(torch.zeros(1, 1, dtype=torch.long, device=device), None, nothing, nothing, None)
    if layouts:
        nodes = _trees(ids.numpy(), rows, 0, costs)
        layout = _layout(_lay_out(nodes), costs, device)
        if _layout_cost(layout, costs) < _plain_cost(rows, costs):
            return _packed(nodes, layout, scored, device)
    return _plain(rows, scored, device)


# ------------------------------------------------------------------------------------------------------------- trees


def _trees(ids: np.ndarray, rows: Sequence[_Row], start: int, costs: Costs) -> list[_Node]:
    """Rows that are equal up to column `start`, as trees from there on; what they share stands once where that pays.

    Where it does not pay for all of them, it may for those that have more in common. In order of appearance.
    """
    if len(rows) == 1:
        return [_Node(list(rows), start, rows[0].end)]
    end = _common(ids, rows, start)
    parts: dict[int, list[_Row]] = {}
    for row in rows:  # one that ends here is a part of its own
        parts.setdefault(-1 - row.index if row.end == end else int(ids[row.index, end]), []).append(row)
    once = _saves(rows, start, end, costs)
    behind = [node for part in parts.values() for node in _trees(ids, part, end if once else start, costs)]
    return [_Node(list(rows), start, end, behind)] if once else behind


def _common(ids: np.ndarray, rows: Sequence[_Row], start: int) -> int:
    """The column up to which all rows are equal, at most the end of the shortest one."""
    end = min(row.end for row in rows)
    first = ids[rows[0].index, start:end]
    for row in rows[1:]:
        differs = (ids[row.index, start : start + len(first)] != first).nonzero()[0]
        first = first[: differs[0]] if len(differs) else first
    return start + len(first)


def _saves(rows: Sequence[_Row], start: int, end: int, costs: Costs) -> bool:
    """Whether it is cheaper to compute columns start .. end - 1 once for all rows."""
    shared = end - start
    saved = (len(rows) - 1) * (costs.token * shared + costs.pair * (shared**2 / 2 + shared * start))
    # One causal call more, one from the branches to what they share, and the merge of the two.
    calls = 3 if costs.whole is None else 0
    return saved > calls * costs.call + costs.merge * sum(row.end - end for row in rows)


def _lay_out(nodes: Sequence[_Node]) -> tuple[Group, ...]:
    """Places in the pass: all roots, then what is behind them tree by tree, so that equal ones follow each other."""
    starts, place = [], 0
    for node in nodes:
        starts.append(place)
        place += node.end - node.start

    def placed(node: _Node) -> Group:
        nonlocal place
        segment = Segment(place, node.end - node.start)
        place += segment.length
        return Group(segment, node.start, tuple(placed(branch) for branch in node.branches))

    return tuple(
        Group(Segment(start, node.end - node.start), node.start, tuple(placed(branch) for branch in node.branches))
        for node, start in zip(nodes, starts, strict=True)
    )


def _plain_cost(rows: Sequence[_Row], costs: Costs) -> float:
    width = max(row.end for row in rows)
    return len(rows) * (costs.token * width + costs.pair * width**2 / 2) + costs.call


def _layout_cost(layout: Layout, costs: Costs) -> float:
    parts = [part for group in layout.groups for part, _ in group.walk()]
    tokens = sum(part.segment.length for part in parts)
    if costs.whole is not None:
        seen = _block_pairs(layout.groups) if costs.whole == "blocks" else tokens**2
        return costs.token * tokens + costs.pair * seen + costs.call
    pairs = sum(batch.n * batch.length**2 / 2 for batch in (*layout.prefixes, *layout.branches))
    pairs += sum(cross.n * cross.prefix.length * cross.branches.length for cross in layout.crosses)
    calls = len(layout.prefixes) + len(layout.branches) + 2 * len(layout.crosses)
    merged = sum(cross.n * cross.branches.length for cross in layout.crosses)
    return costs.token * tokens + costs.pair * pairs + costs.call * calls + costs.merge * merged


def _block_pairs(groups: Sequence[Group]) -> float:
    """Pairs in blocks that have one to see, about: half a block more at the end of each of two runs of keys."""
    return sum(
        part.segment.length * (part.before + part.segment.length / 2 + BLOCK)
        for group in groups
        for part, _ in group.walk()
    )


# ------------------------------------------------------------------------------------------------------ the attention


def _layout(groups: tuple[Group, ...], costs: Costs, device: torch.device) -> Layout:
    branches, branches_of = [], []
    for group, path in (each for root in groups for each in root.walk()):
        own = [branch.segment for branch in group.branches if branch.segment.length]
        branches += own
        if own:
            before = tuple(part.segment for part in (*path, group))
            branches_of.append((before, _padded(sorted(own, key=_descending), device)))
    return Layout(
        groups=groups,
        prefixes=_batches([group.segment for group in groups], costs, device),
        branches=_batches(branches, costs, device),
        crosses=_crosses(groups),
        branches_of=tuple(branches_of),
    )


def _descending(segment: Segment) -> int:
    return -segment.length


def _batches(segments: Sequence[Segment], costs: Costs, device: torch.device) -> tuple[Padded, ...]:
    """Segments in few causal calls: padded to a common length as long as that is cheaper than one call more."""
    batches: list[list[Segment]] = []
    for segment in sorted(segments, key=_descending):
        wasted = batches[-1][0].length ** 2 - segment.length**2 if batches else 0
        if batches and costs.pair * wasted / 2 <= costs.call:
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return tuple(_padded(batch, device) for batch in batches)


def _padded(segments: Sequence[Segment], device: torch.device) -> Padded:
    """Segments, the longest first, in one batch."""
    length = segments[0].length
    starts = np.array([s.start for s in segments])[:, None]
    lengths = np.array([s.length for s in segments])[:, None]
    columns = np.arange(length)[None, :]
    tokens = (starts + np.minimum(columns, lengths - 1)).reshape(-1)
    padding = np.broadcast_to(columns >= lengths, (len(segments), length)).reshape(-1)
    if padding.any():
        real, unreal = (torch.from_numpy(p.nonzero()[0]).to(device) for p in (~padding, padding))
        return Padded(len(segments), length, torch.from_numpy(tokens).to(device), real, unreal)
    if (np.diff(tokens) == 1).all():
        return Padded(len(segments), length, slice(int(tokens[0]), int(tokens[-1]) + 1), None, None)
    return Padded(len(segments), length, torch.from_numpy(tokens).to(device), None, None)


def _crosses(groups: Sequence[Group]) -> tuple[Cross, ...]:
    """One attention call for all neighbouring segments of equal shape."""
    crosses: list[Cross] = []
    inner = [part for group in groups for part, path in group.walk() if path]
    for group in (*groups, *inner):
        behind = [part.segment for part, path in group.walk() if path]
        length = sum(segment.length for segment in behind)
        if not length:
            continue
        last = crosses[-1] if crosses else None
        follows = (
            last is not None
            and (last.prefix.length, last.branches.length) == (group.segment.length, length)
            and last.prefix.start + last.n * last.prefix.length == group.segment.start
            and last.branches.start + last.n * last.branches.length == behind[0].start
        )
        if follows:
            crosses[-1] = Cross(last.n + 1, last.prefix, last.branches)
        else:
            crosses.append(Cross(1, group.segment, Segment(behind[0].start, length)))
    return tuple(crosses)


# ----------------------------------------------------------------------------------------------------------- the plans


def _plain(rows: Sequence[_Row], scored: np.ndarray, device: torch.device) -> PackedPass:
    columns, width = scored.shape[1], max(row.end for row in rows)
    source = np.array([row.index for row in rows])[:, None] * columns + np.arange(width)[None, :]
    kept = scored[[row.index for row in rows]]
    places, found = kept.nonzero()
    targets = np.array([row.index for row in rows])[places] * columns + found
    return PackedPass(
        source=torch.from_numpy(source).to(device),
        positions=None,
        predictors=torch.from_numpy(places * width + found - 1).to(device),
        targets=torch.from_numpy(targets).to(device),
        layout=None,
    )


def _packed(nodes: Sequence[_Node], layout: Layout, scored: np.ndarray, device: torch.device) -> PackedPass:
    columns = scored.shape[1]
    total = sum(part.segment.length for group in layout.groups for part, _ in group.walk())
    source, positions = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    predictors, targets = [], []

    def place(node: _Node, group: Group, before: np.ndarray) -> None:
        own = np.arange(group.segment.start, group.segment.start + group.segment.length)
        positions[own] = np.arange(node.start, node.end)
        source[own] = node.rows[0].index * columns + positions[own]
        places = np.concatenate([before, own])  # of the columns of these rows, as far as they are known
        for branch, below in zip(node.branches, group.branches, strict=True):
            place(branch, below, places)
        if not node.branches:
            (row,) = node.rows
            found = scored[row.index].nonzero()[0]
            predictors.append(places[found - 1])
            targets.append(row.index * columns + found)

    for node, group in zip(nodes, layout.groups, strict=True):
        place(node, group, np.empty(0, dtype=np.int64))
    return PackedPass(
        source=torch.from_numpy(source[None]).to(device),
        positions=torch.from_numpy(positions[None]).to(device),
        predictors=torch.from_numpy(np.concatenate(predictors)).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        layout=layout,
    )
