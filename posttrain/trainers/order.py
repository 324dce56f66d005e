"""Which items an optimizer step uses: a pure function of (seed, step), so that resuming needs no cursor to be saved."""

from __future__ import annotations

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
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return [int(self._pass(p // self.n_items)[p % self.n_items]) for p in positions]

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        """The contiguous part of `items(step)` that `rank` works on; `per_step` is a multiple of `world_size`."""
        items = self.items(step)
        size = len(items) // world_size
        return items[rank * size : (rank + 1) * size]


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
