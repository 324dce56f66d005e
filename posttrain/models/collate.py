"""From samples to padded tensors, and back to the objective's view of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.data.sample import Origin, Sample
from posttrain.objectives.batch import GUIDED, TokenBatch

Tensors = dict[str, Tensor]
"""One micro-batch: `ids`, `attention_mask` (B, T) int64, `mask` (B, T) bool, and what the shell adds: `advantages`
(B,) or (B, T), `behaviour_logps`, `old_logps`, `ref_logps`, `old_values`, `returns` (B, T) float32, `rewards` (B,),
`steps` (B, T) int64, `expert` (B,) bool, `group` (B,) int64, and behind `FURTHER` those of `TokenBatch.further`."""

FURTHER = "further/"
"""Prefix of the tensors that go into `TokenBatch.further`."""

VALUE = "value/"
"""Prefix of the tensors that carry numbers of rows of responses."""


def collate(samples: Sequence[Sample], pad_id: int) -> Tensors:
    """Right-padded tensors. Attention and loss masks come from positions; the first token is never trained on."""
    width = max(len(sample.ids) for sample in samples)
    shape = (len(samples), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    attention = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        attention[row, :length] = 1
        mask[row, :length] = torch.tensor(sample.loss_mask, dtype=torch.bool)
    mask[:, 0] = False
    tensors = {"ids": ids, "attention_mask": attention, "mask": mask}
    if all(sample.behaviour_logps is not None for sample in samples):
        behaviour = torch.zeros(shape)
        for row, sample in enumerate(samples):
            behaviour[row, : len(sample.ids)] = torch.tensor(sample.behaviour_logps)
        tensors["behaviour_logps"] = behaviour
    if any(sample.guided for sample in samples):
        guided = tensors[FURTHER + GUIDED] = torch.zeros(shape, dtype=torch.bool)
        for row, sample in enumerate(samples):
            guided[row, len(sample.ids) - sample.guided : len(sample.ids)] = True
    return tensors


def regrouped(
    batches: Sequence[Tensors], chosen: Sequence[int], micro_batch: int, pad_id: int, *, packs: bool
) -> list[tuple[Tensors, list[int]]]:
    """Rows of several micro-batches in micro-batches of their own, each with the numbers of its rows.

    Args:
        batches: with the same keys; rows are numbered through.
        chosen: numbers of the rows.
        micro_batch, packs: as in `split`.
    """
    places = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch["ids"]))]
    rows = []
    for index in chosen:
        number, row = places[index]
        length = int(batches[number]["attention_mask"][row].sum())
        rows.append({k: v[row] if v.dim() == 1 else v[row, :length] for k, v in batches[number].items()})
    samples = [Sample(row["ids"].tolist(), row["mask"].int().tolist(), Origin.POLICY) for row in rows]
    made = []
    for indices in split(samples, micro_batch, packs=packs):
        part = [rows[i] for i in indices]
        tensors = {
            name: torch.stack([row[name] for row in part])
            if value.dim() == 0
            else pad_sequence([row[name] for row in part], True, pad_id if name == "ids" else 0)
            for name, value in part[0].items()
        }
        made.append((tensors, [chosen[i] for i in indices]))
    return made


def actions(tensors: Tensors) -> Tensor:
    """(B, T): of the tokens under the mask, those that the policy chose."""
    guided = tensors.get(FURTHER + GUIDED)
    return tensors["mask"] if guided is None else tensors["mask"] & ~guided


def split(samples: Sequence[Sample], micro_batch: int, *, packs: bool) -> list[list[int]]:
    """Row indices of each micro-batch: as few tokens to compute as possible, and then as evenly as possible.

    Rows of one prompt stay together, since a prompt is computed once per micro-batch (see `models.shared_prefix`),
    unless they do not fit. Losses are sums divided by global counts, so the grouping changes no gradient. A pure
    function of the rows: nothing is drawn.

    Args:
        samples: rows; those without a trained token cost nothing.
        micro_batch: most rows of a micro-batch.
        packs: whether the model computes rows without padding and shared prompts once (`token_logps.sharing_obstacle`).

    Returns:
        As many micro-batches as rows need, the fullest first; within one, prompts by their longest row.
    """
    return _split(_rows(samples), micro_batch, packs=packs)


def split_episodes(samples: Sequence[Sample], micro_batch: int, *, packs: bool) -> list[list[int]]:
    """As `split`, with as many micro-batches as if each episode were one row: `micro_batch` counts episodes.

    So the number of micro-batches of a step does not depend on how many rows an episode turns out to be.
    """
    episodes = [number for number, sample in enumerate(samples) if sample.part == 0]
    if len(episodes) == len(samples):
        return split(samples, micro_batch, packs=packs)
    parts = split([samples[number] for number in episodes], micro_batch, packs=packs)
    ends = [*episodes[1:], len(samples)]
    return [[row for i in part for row in range(episodes[i], ends[i])] for part in parts]


def split_pairs(pairs: Sequence[Sequence[Sample]], micro_batch: int, *, packs: bool) -> list[list[int]]:
    """As `split`, for rows of several responses that stay together; those with a prompt in common compute it once."""
    return _split(_joined(pairs), micro_batch, packs=packs)


def _split(rows: Sequence[_Row], micro_batch: int, *, packs: bool) -> list[list[int]]:
    ways = [_by_length(rows, micro_batch)]
    if packs and len(ways[0]) > 1:
        ways += [_balanced(rows, micro_batch, by_rows=by_rows) for by_rows in (False, True)]

    def cost(way: list[list[int]]) -> tuple[int, int]:
        sizes = [_computed_tokens([rows[i] for i in part], packs=packs) for part in way]
        return sum(sizes), max(sizes, default=0)

    best = min(ways, key=cost)
    return sorted(best, key=lambda part: -_computed_tokens([rows[i] for i in part], packs=packs))


@dataclass(frozen=True, slots=True)
class _Row:
    """What a forward pass computes of a row.

    Attributes:
        prompt: a number that rows of one prompt share; rows without a trained token have one each.
        length: of the row.
        shared: tokens before the first trained one.
        own: tokens from there up to that which predicts the last trained one.
    """

    prompt: int
    length: int
    shared: int
    own: int


def _rows(samples: Sequence[Sample]) -> list[_Row]:
    numbers: dict[tuple[int, ...] | int, int] = {}
    rows = []
    for i, sample in enumerate(samples):
        trained = [place for place, value in enumerate(sample.loss_mask) if value and place > 0]
        shared, own = (trained[0], trained[-1] - trained[0]) if trained else (0, 0)
        number = numbers.setdefault(tuple(sample.ids[:shared]) if trained else i, len(numbers))
        rows.append(_Row(number, len(sample.ids), shared, own))
    return rows


def _joined(pairs: Sequence[Sequence[Sample]]) -> list[_Row]:
    """What a forward pass computes of all responses of a row: as if they were one, behind the prompt of the first."""
    responses = iter(_rows([sample for pair in pairs for sample in pair]))
    joined = []
    for pair in pairs:
        own = [next(responses) for _ in pair]
        first = own[0]
        others = {row.prompt: row.shared for row in own if row.prompt != first.prompt}
        computed = sum(row.own for row in own) + sum(others.values())
        joined.append(_Row(first.prompt, max(row.length for row in own), first.shared, computed))
    return joined


def _computed_tokens(rows: Sequence[_Row], *, packs: bool) -> int:
    if not packs:
        trained = [row for row in rows if row.shared]
        return len(trained) * max((row.shared + row.own for row in trained), default=0)
    return sum({row.prompt: row.shared for row in rows}.values()) + sum(row.own for row in rows)


def _by_length(rows: Sequence[_Row], micro_batch: int) -> list[list[int]]:
    """Prompts by their longest row, cut wherever a micro-batch is full: least padding."""
    order = _ordered(rows, range(len(rows)))
    return [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]


def _ordered(rows: Sequence[_Row], members: Iterable[int]) -> list[int]:
    """Rows of a prompt next to each other, and prompts of equal shape too, which then share attention calls."""
    members = list(members)
    longest: dict[int, int] = {}
    first: dict[int, int] = {}
    for i in members:
        longest[rows[i].prompt] = max(longest.get(rows[i].prompt, 0), rows[i].length)
        first[rows[i].prompt] = min(first.get(rows[i].prompt, i), i)
    return sorted(members, key=lambda i: (longest[rows[i].prompt], first[rows[i].prompt], rows[i].length, i))


def _balanced(rows: Sequence[_Row], micro_batch: int, *, by_rows: bool) -> list[list[int]]:
    """Groups of one prompt, the largest first, each to the micro-batch with the fewest tokens that has room for it.

    A group is cut where it is larger than a micro-batch, or where no room is left for it as a whole. Largest by tokens
    balances best, by rows cuts least.
    """
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(i)
    pieces = []
    for members in groups.values():
        whole, rest = divmod(len(members), micro_batch)
        pieces += _deal(rows, members, [micro_batch] * whole + [rest] * (rest > 0))
    parts: list[list[int]] = [[] for _ in range(-(-len(rows) // micro_batch))]
    tokens = [0] * len(parts)

    def urgency(piece: list[int]) -> tuple[int, int, int]:
        size = _computed_tokens([rows[i] for i in piece], packs=True)
        return (-len(piece) if by_rows else -size, -size, piece[0])

    waiting = [(urgency(piece), piece) for piece in pieces]
    heapify(waiting)
    while waiting:
        _, piece = heappop(waiting)
        fitting = [n for n, part in enumerate(parts) if micro_batch - len(part) >= len(piece)]
        if fitting:
            place = min(fitting, key=lambda n: tokens[n])
        else:
            place = min(range(len(parts)), key=lambda n: (len(parts[n]), tokens[n]))
            room = micro_batch - len(parts[place])
            piece, left = _deal(rows, piece, [room, len(piece) - room])
            heappush(waiting, (urgency(left), left))
        parts[place] += piece
        tokens[place] = _computed_tokens([rows[i] for i in parts[place]], packs=True)
    return [_ordered(rows, part) for part in parts]


def _deal(rows: Sequence[_Row], members: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut a group into pieces of given sizes, long and short rows in each."""
    pieces: list[list[int]] = [[] for _ in sizes]
    tokens = [0] * len(sizes)
    for i in sorted(members, key=lambda i: (-rows[i].own, i)):
        open_ = [n for n, size in enumerate(sizes) if len(pieces[n]) < size]
        place = min(open_, key=lambda n: tokens[n])
        pieces[place].append(i)
        tokens[place] += rows[i].own
    return [sorted(piece) for piece in pieces]


def token_batch(
    tensors: Tensors,
    logps: Tensor | None = None,
    entropies: Tensor | None = None,
    max_length: int | None = None,
    values: Tensor | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> TokenBatch:
    """The objective's view of a micro-batch; `further` joins what stands behind `FURTHER` in it."""
    own = {name.removeprefix(FURTHER): value for name, value in tensors.items() if name.startswith(FURTHER)}
    return TokenBatch(
        mask=tensors["mask"],
        logps=logps,
        entropies=entropies,
        old_logps=tensors.get("old_logps"),
        ref_logps=tensors.get("ref_logps"),
        advantages=tensors.get("advantages"),
        max_length=max_length,
        expert=tensors.get("expert"),
        values=values,
        old_values=tensors.get("old_values"),
        returns=tensors.get("returns"),
        rewards=tensors.get("rewards"),
        steps=tensors.get("steps"),
        further=own | dict(further or {}),
    )
