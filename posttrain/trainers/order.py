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
