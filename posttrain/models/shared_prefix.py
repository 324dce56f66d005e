"""Which tokens a forward pass computes: shared prompts once, no padding, nothing behind the last scored token.

Rows of a micro-batch are cut after the token that predicts their last scored one. Rows that begin with the same
unscored tokens (a prompt, a prompt with a prefix) form a group: the shared part stands once in the pass, and each row
keeps a branch of its own. Prior art: Prefix Grouper (arXiv 2506.05433), padding removal as in verl.

Pure planning on the CPU; `models.attention` computes attention in a layout, `models.token_logps` runs the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """A prefix and the branches that go on from it; a row that shares nothing is a prefix without branches."""

    prefix: Segment
    branches: tuple[Segment, ...]


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
    """n prefixes of one length that follow each other, and as many runs of branch tokens that attend to them."""

    n: int
    prefix: Segment
    branches: Segment


@dataclass(frozen=True, slots=True)
class Layout:
    """The attention pattern of a pass of T tokens: causal within each segment, and from branches to their prefix.

    Attributes:
        prefixes, branches: all segments, for causal calls.
        crosses: the calls from branches to prefixes.
        branches_of: the branches of each group in one batch; None where there are none.
        masks: FlexAttention's block masks by sliding window, made when a layer first asks for one.
    """

    groups: tuple[Group, ...]
    prefixes: tuple[Padded, ...]
    branches: tuple[Padded, ...]
    crosses: tuple[Cross, ...]
    branches_of: tuple[Padded | None, ...]
    masks: dict[int | None, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(g.prefix.length + max((b.length for b in g.branches), default=0) for g in self.groups)


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
    """A row with scored tokens: the first scored column, and the last one, which is no input any more."""

    index: int
    start: int
    end: int


def plan(ids: Tensor, mask: Tensor, costs: Costs, *, layouts: bool, device: torch.device) -> PackedPass:
    """The cheapest forward pass that gives the log-probs of all scored tokens.

    Args:
        ids: (B, T) right-padded rows, on the CPU.
        mask: (B, T) bool, True on scored tokens, on the CPU; `mask[:, 0]` is 0.
        layouts: whether the model's attention can follow a layout; else the pass is made of plain rows.
        device: where the plan's tensors go.
    """
    scored = (mask != 0).numpy()
    rows = [_Row(int(r), int(scored[r].argmax()), int(scored[r].nonzero()[0][-1])) for r in scored.any(1).nonzero()[0]]
    if not rows:  # one token, so that gradients are zero instead of missing
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return PackedPass(torch.zeros(1, 1, dtype=torch.long, device=device), None, nothing, nothing, None)
    if layouts:
        groups = _groups(ids.numpy(), rows, costs)
        laid_out = _lay_out(groups)
        layout = _layout(laid_out, costs, device)
        if _layout_cost(layout, laid_out, costs) < _plain_cost(rows, costs):
            return _packed(groups, laid_out, layout, scored, device)
    return _plain(rows, scored, device)


# ------------------------------------------------------------------------------------------------------------ groups


def _groups(ids: np.ndarray, rows: Sequence[_Row], costs: Costs) -> list[list[_Row]]:
    """Rows that share their unscored beginning, where sharing pays; all others alone. In order of appearance."""
    found: dict[bytes, list[_Row]] = {}
    for row in rows:
        found.setdefault(ids[row.index, : row.start].tobytes(), []).append(row)
    groups: list[list[_Row]] = []
    for members in found.values():
        shared = members[0].start
        saved = (len(members) - 1) * (costs.token * shared + costs.pair * shared**2 / 2)
        # One causal call more, one from the branches to the prefix, and the merge of the two.
        calls = 3 if costs.whole is None else 0
        extra = calls * costs.call + costs.merge * sum(row.end - row.start for row in members)
        groups += [members] if saved > extra else [[row] for row in members]
    return groups


def _lay_out(groups: Sequence[Sequence[_Row]]) -> tuple[Group, ...]:
    """Places in the pass: all prefixes, then the branches group by group, so that equal ones follow each other."""
    prefixes, place = [], 0
    for members in groups:
        length = members[0].start if len(members) > 1 else members[0].end
        prefixes.append(Segment(place, length))
        place += length
    laid_out = []
    for members, prefix in zip(groups, prefixes, strict=True):
        branches = []
        for row in members if len(members) > 1 else ():
            branches.append(Segment(place, row.end - row.start))
            place += row.end - row.start
        laid_out.append(Group(prefix, tuple(branches)))
    return tuple(laid_out)


def _plain_cost(rows: Sequence[_Row], costs: Costs) -> float:
    width = max(row.end for row in rows)
    return len(rows) * (costs.token * width + costs.pair * width**2 / 2) + costs.call


def _layout_cost(layout: Layout, groups: Sequence[Group], costs: Costs) -> float:
    tokens = sum(g.prefix.length + sum(b.length for b in g.branches) for g in groups)
    if costs.whole is not None:
        seen = _block_pairs(groups) if costs.whole == "blocks" else tokens**2
        return costs.token * tokens + costs.pair * seen + costs.call
    pairs = sum(batch.n * batch.length**2 / 2 for batch in (*layout.prefixes, *layout.branches))
    pairs += sum(cross.n * cross.prefix.length * cross.branches.length for cross in layout.crosses)
    calls = len(layout.prefixes) + len(layout.branches) + 2 * len(layout.crosses)
    merged = sum(cross.n * cross.branches.length for cross in layout.crosses)
    return costs.token * tokens + costs.pair * pairs + costs.call * calls + costs.merge * merged


def _block_pairs(groups: Sequence[Group]) -> float:
    """Pairs in blocks that have one to see, about: half a block more at the end of each of two runs of keys."""
    return sum(
        segment.length * (before + segment.length / 2 + BLOCK)
        for group in groups
        for segment, before in ((group.prefix, 0), *((branch, group.prefix.length) for branch in group.branches))
    )


# ------------------------------------------------------------------------------------------------------ the attention


def _layout(groups: tuple[Group, ...], costs: Costs, device: torch.device) -> Layout:
    branches = [[b for b in group.branches if b.length] for group in groups]
    return Layout(
        groups=groups,
        prefixes=_batches([g.prefix for g in groups], costs, device),
        branches=_batches([b for own in branches for b in own], costs, device),
        crosses=_crosses(groups),
        branches_of=tuple(_padded(sorted(own, key=_descending), device) if own else None for own in branches),
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
    """One attention call for all neighbouring groups of equal shape."""
    crosses: list[Cross] = []
    for group in groups:
        length = sum(b.length for b in group.branches)
        if not length:
            continue
        last = crosses[-1] if crosses else None
        follows = (
            last is not None
            and (last.prefix.length, last.branches.length) == (group.prefix.length, length)
            and last.prefix.start + last.n * last.prefix.length == group.prefix.start
            and last.branches.start + last.n * last.branches.length == group.branches[0].start
        )
        if follows:
            crosses[-1] = Cross(last.n + 1, last.prefix, last.branches)
        else:
            crosses.append(Cross(1, group.prefix, Segment(group.branches[0].start, length)))
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


def _packed(
    groups: Sequence[Sequence[_Row]],
    laid_out: Sequence[Group],
    layout: Layout,
    scored: np.ndarray,
    device: torch.device,
) -> PackedPass:
    columns = scored.shape[1]
    total = sum(g.prefix.length + sum(b.length for b in g.branches) for g in laid_out)
    source, positions = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    predictors, targets = [], []

    def place(segment: Segment, row: _Row, first: int) -> None:
        inside = slice(segment.start, segment.start + segment.length)
        positions[inside] = np.arange(first, first + segment.length)
        source[inside] = row.index * columns + positions[inside]

    for members, group in zip(groups, laid_out, strict=True):
        shared = group.prefix.length
        place(group.prefix, members[0], 0)
        for row, branch in zip(members, group.branches, strict=False):  # a row alone has no branch
            place(branch, row, shared)
        for number, row in enumerate(members):
            found = scored[row.index].nonzero()[0]
            before = found - 1
            branch_start = group.branches[number].start if group.branches else 0
            predictors.append(np.where(before < shared, group.prefix.start + before, branch_start + before - shared))
            targets.append(row.index * columns + found)
    return PackedPass(
        source=torch.from_numpy(source[None]).to(device),
        positions=torch.from_numpy(positions[None]).to(device),
        predictors=torch.from_numpy(np.concatenate(predictors)).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        layout=layout,
    )
