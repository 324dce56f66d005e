"""Which items an optimizer step uses: a pure function of (seed, step), so that resuming needs no cursor to be saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class StepOrder:
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
        """Item indices of optimizer step `step` (from 0) over all ranks."""
        return self.between(step * self.per_step, (step + 1) * self.per_step)

    def between(self, start: int, stop: int) -> list[int]:
        """Item indices at these positions of the sequence."""
        return [int(self._pass(p // self.n_items)[p % self.n_items]) for p in range(start, stop)]

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        """The contiguous part of `items(step)` that `rank` works on; `per_step` is a multiple of `world_size`."""
        return _share(self.items(step), rank, world_size)


def _share(items: list[int], rank: int, world_size: int) -> list[int]:
    size = len(items) // world_size
    return items[rank * size : (rank + 1) * size]


class WeightedOrder:
    """Draws with replacement in proportion to weights; as `StepOrder`, a pure function of (seed, step)."""

    def __init__(self, weights: Sequence[float], per_step: int, seed: int) -> None:
        if not weights or min(weights) < 0 or per_step < 1:
            raise ValueError(f"need weights from 0 and at least one item per step, got {per_step}")
        self.per_step, self.seed = per_step, seed
        self._edges = np.cumsum(np.asarray(weights, dtype=np.float64))

    def items(self, step: int) -> list[int]:
        """As `StepOrder.items`."""
        draws = np.random.default_rng([self.seed, step]).random(self.per_step) * self._edges[-1]
        return [int(i) for i in np.searchsorted(self._edges, draws, side="right").clip(max=len(self._edges) - 1)]

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        """As `StepOrder.share`."""
        return _share(self.items(step), rank, world_size)


def order_of(weights: Sequence[float], per_step: int, seed: int) -> StepOrder | WeightedOrder:
    """Passes over the items where their weights are equal, else draws by weight."""
    if len(set(weights)) <= 1:
        return StepOrder(len(weights), per_step, seed)
    return WeightedOrder(weights, per_step, seed)


class StagedOrder:
    """Stages one after another, each with its own items and a share of the steps in proportion to their number.

    Args:
        stages: item indices of each stage; not empty.
        per_step: items per optimizer step over all ranks.
        max_steps: optimizer steps of the whole run; at least one per stage.
    """

    def __init__(self, stages: list[list[int]], per_step: int, max_steps: int, seed: int) -> None:
        if max_steps < len(stages):
            raise ValueError(f"{max_steps} steps cannot hold {len(stages)} stages")
        self.stages = stages
        self.orders = [StepOrder(len(items), per_step, seed + number) for number, items in enumerate(stages)]
        total, ends, seen = sum(len(items) for items in stages), [], 0
        for number, items in enumerate(stages):
            seen += len(items)
            least, most = number + 1, max_steps - (len(stages) - number - 1)
            ends.append(min(max(round(max_steps * seen / total), least, (ends or [0])[-1] + 1), most))
        self.starts = [0, *ends[:-1]]

    def stage(self, step: int) -> int:
        """The stage that optimizer step `step` (from 0) belongs to."""
        return sum(start <= step for start in self.starts) - 1

    def items(self, step: int) -> list[int]:
        """Item indices of a step over all ranks."""
        stage = self.stage(step)
        return [self.stages[stage][i] for i in self.orders[stage].items(step - self.starts[stage])]

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        """As `StepOrder.share`."""
        stage = self.stage(step)
        return [self.stages[stage][i] for i in self.orders[stage].share(step - self.starts[stage], rank, world_size)]
