"""Which items an optimizer step uses: a pure function of (seed, step), so that resuming needs no cursor to be saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np


class Order(ABC):
    """Item indices of optimizer steps."""

    @abstractmethod
    def items(self, step: int) -> list[int]:
        """Item indices of optimizer step `step` (from 0) over all ranks."""

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        """The contiguous part of `items(step)` that `rank` works on; the step is a multiple of `world_size`."""
        items = self.items(step)
        size = len(items) // world_size
        return items[rank * size : (rank + 1) * size]


class StepOrder(Order):
    """An endless sequence of shuffled passes over `n_items`, cut into steps of `per_step`.

    A step may span two passes; nothing is dropped at the end of a pass. The order depends neither on the number of
    ranks nor on the micro-batch.
    """

    def __init__(self, n_items: int, per_step: int, seed: int) -> None:
        if n_items < 1 or per_step < 1:
            raise ValueError(f"need at least one item and one per step, got {n_items} and {per_step}")
        self.n_items, self.per_step, self.seed = n_items, per_step, seed
        self._passes: dict[int, np.ndarray] = {}

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = np.random.default_rng([self.seed, number]).permutation(self.n_items)
        return self._passes[number]

    def items(self, step: int) -> list[int]:
        return self.between(step * self.per_step, (step + 1) * self.per_step)

    def between(self, start: int, stop: int) -> list[int]:
        """Item indices at these positions of the sequence."""
        return [int(self._pass(p // self.n_items)[p % self.n_items]) for p in range(start, stop)]


MINIBATCH_STREAM = 8
"""Tells the draws of minibatches from others of the same seed and rollout."""


def minibatches_of(groups: Sequence[int], parts: int, seed: int, window: int, epoch: int) -> list[int]:
    """Which of `parts` minibatches each group of a rollout is in, in a pass over it.

    Of every `parts` groups that are numbered one after another each minibatch has one, drawn anew for every pass. So
    ranks, which hold whole runs of groups, have equally many of each, and the draw does not depend on their number.
    """

    def of_block(block: int) -> np.ndarray:
        return np.random.default_rng([seed, window, MINIBATCH_STREAM, epoch, block]).permutation(parts)

    blocks = {block: of_block(block) for block in {group // parts for group in groups}}
    return [int(blocks[group // parts][group % parts]) for group in groups]


class WeightedOrder(Order):
    """Draws with replacement in proportion to weights; as `StepOrder`, a pure function of (seed, step)."""

    def __init__(self, weights: Sequence[float], per_step: int, seed: int) -> None:
        if not weights or min(weights) < 0 or per_step < 1:
            raise ValueError(f"need weights from 0 and at least one item per step, got {per_step}")
        self.per_step, self.seed = per_step, seed
        self._edges = np.cumsum(np.asarray(weights, dtype=np.float64))

    def items(self, step: int) -> list[int]:
        draws = np.random.default_rng([self.seed, step]).random(self.per_step) * self._edges[-1]
        return [int(i) for i in np.searchsorted(self._edges, draws, side="right").clip(max=len(self._edges) - 1)]


def order_of(weights: Sequence[float], per_step: int, seed: int) -> StepOrder | WeightedOrder:
    """Passes over the items where their weights are equal, else draws by weight."""
    if len(set(weights)) <= 1:
        return StepOrder(len(weights), per_step, seed)
    return WeightedOrder(weights, per_step, seed)


class StagedOrder(Order):
    """Stages one after another, each with its own items and a share of the steps in proportion to their number.

    Args:
        stages: item indices of each stage; not empty.
        per_step: items per optimizer step over all ranks.
        max_steps: optimizer steps of the whole run; at least one per stage.
        mixture: draws the items of the only stage, in place of passes over them.
    """

    def __init__(
        self, stages: list[list[int]], per_step: int, max_steps: int, seed: int, mixture: MixtureOrder | None = None
    ) -> None:
        if max_steps < len(stages):
            raise ValueError(f"{max_steps} steps cannot hold {len(stages)} stages")
        self.stages = stages
        self.orders: list[StepOrder | MixtureOrder] = [
            StepOrder(len(items), per_step, seed + number) for number, items in enumerate(stages)
        ]
        if mixture is not None:
            self.orders = [mixture]
        ends: list[int] = []
        total, seen = sum(len(items) for items in stages), 0
        for number, items in enumerate(stages):
            seen += len(items)
            least, most = number + 1, max_steps - (len(stages) - number - 1)
            ends.append(min(max(round(max_steps * seen / total), least, (ends or [0])[-1] + 1), most))
        self.starts = [0, *ends[:-1]]

    def stage(self, step: int) -> int:
        """The stage that optimizer step `step` (from 0) belongs to."""
        return sum(start <= step for start in self.starts) - 1

    def items(self, step: int) -> list[int]:
        stage = self.stage(step)
        return [self.stages[stage][i] for i in self.orders[stage].items(step - self.starts[stage])]


class MixtureOrder(Order):
    """Draws from several sources by weight. As `StepOrder`, a pure function of (seed, step).

    A step takes rows of each source in proportion to the weights, to within one row; which source gets a row that the
    proportions leave over is drawn. The rows of a source come in shuffled passes over it, by themselves. A source that
    has been passed over as often as `limits` allows takes part no longer, and the others keep their proportions.

    Args:
        sources: name -> item indices; not empty.
        stages: optimizer steps, from 0, and the share of each source from there on; shares sum to 1.
        per_step: items per optimizer step over all ranks.
        limits: name -> items of the source that are drawn at most; None for no limit.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[int]],
        stages: Sequence[tuple[int, Mapping[str, float]]],
        per_step: int,
        seed: int,
        limits: Mapping[str, int | None] | None = None,
    ) -> None:
        self.names, self.per_step, self.seed = list(sources), per_step, seed
        self.sources = [sources[name] for name in self.names]
        self.starts = [start for start, _ in stages]
        self._weights = [np.array([shares[name] for name in self.names]) for _, shares in stages]
        most = [(limits or {}).get(name) for name in self.names]
        self.limits = np.array([np.inf if limit is None else limit for limit in most])
        self._passes = [StepOrder(len(items), 1, seed + 7919 * (i + 1)) for i, items in enumerate(self.sources)]
        self._drawn = [np.zeros(len(self.names), dtype=np.int64)]

    def drawn(self, step: int) -> dict[str, int]:
        """How often each source was drawn from before optimizer step `step`."""
        while len(self._drawn) <= step:
            number = len(self._drawn) - 1
            counts = np.bincount(self._sources_of(number), minlength=len(self.names))
            self._drawn.append(self._drawn[-1] + counts)
        return {name: int(n) for name, n in zip(self.names, self._drawn[step], strict=True)}

    def passes(self, step: int) -> dict[str, float]:
        """Passes over each source before optimizer step `step`."""
        return {name: n / len(self.sources[i]) for i, (name, n) in enumerate(self.drawn(step).items())}

    def weights(self, step: int) -> dict[str, float]:
        """The share of each source in a step; 0 for one that has ended."""
        drawn = np.array(list(self.drawn(step).values()))
        weights = np.where(drawn < self.limits, self._weights_of(step), 0.0)
        return dict(zip(self.names, (weights / weights.sum()).tolist(), strict=True))

    def _weights_of(self, step: int) -> np.ndarray:
        return self._weights[bisect_right(self.starts, step) - 1]

    def ends(self, step: int) -> list[str]:
        """The sources that take part for the last time in this step."""
        before, after = self.drawn(step), self.drawn(step + 1)
        return [
            name for name, limit in zip(self.names, self.limits, strict=True) if before[name] < limit <= after[name]
        ]

    def items(self, step: int) -> list[int]:
        at = list(self.drawn(step).values())
        found: list[int] = []
        for source in self._sources_of(step):
            found.append(self.sources[source][self._passes[source].between(at[source], at[source] + 1)[0]])
            at[source] += 1
        return found

    def between(self, start: int, stop: int) -> list[int]:
        """As `StepOrder.between`."""
        first, last = start // self.per_step, -(-stop // self.per_step)
        found = [item for step in range(first, last) for item in self.items(step)]
        return found[start - first * self.per_step : stop - first * self.per_step]

    def _sources_of(self, step: int) -> np.ndarray:
        """The source of each item of a step, in a shuffled order.

        Raises:
            ValueError: all sources have ended.
        """
        generator = np.random.default_rng([self.seed, step])
        left, weights = self.limits - self._drawn[step], self._weights_of(step)
        counts = np.zeros(len(self.names), dtype=np.int64)
        while (missing := self.per_step - counts.sum()) > 0:
            open_ = (counts < left) & (weights > 0)
            if not open_.any():
                raise ValueError(f"all sources have ended before step {step}")
            edges = np.cumsum(np.where(open_, weights, 0.0))
            points = (np.arange(missing) + generator.random()) / missing * edges[-1]
            drawn = np.bincount(np.searchsorted(edges, points, side="right"), minlength=len(self.names) + 1)
            counts = np.minimum(counts + drawn[: len(self.names)], left).astype(np.int64)
        return generator.permutation(np.repeat(np.arange(len(self.names)), counts))
