"""What the methods share that learn from single completions, each good or bad: rows, counting, diagnostics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from posttrain.config.needs import Needs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Sample, Unpaired
from posttrain.errors import DataError
from posttrain.lazy import Tensor
from posttrain.methods.base import C, PointwiseMethod
from posttrain.objectives.batch import LossSum, PreferenceBatch
from posttrain.objectives.sequences import log_ratios


class UnpairedMethod(PointwiseMethod[C]):
    """A loss of each labelled completion against a number of the whole step. Role `completion`, value `label`.

    Term: `unpaired` (unit: sequences).
    """

    term = "unpaired"

    @property
    def needs(self) -> Needs:
        return Needs(data=("unpaired",), reference=True)

    def prepare(self, rows: Sequence[Unpaired]) -> list[Unpaired]:
        """All rows.

        Raises:
            DataError: all have the same label.
        """
        if len({row.label for row in rows}) == 1:
            raise DataError(
                f"all {len(rows):,} rows are labelled {str(rows[0].label).lower()}, so nothing tells good from bad",
                where=rows[0].problem.where,
                hint="give rows of both kinds, or name the column that tells them apart (data.unpaired.label); for "
                "completions that are all good there is sft",
            )
        return list(rows)

    def responses(self, row: Unpaired, renderer: Renderer) -> dict[str, Sample]:
        return {"completion": renderer.sample(Example(row.problem, row.completion))}

    def values(self, row: Unpaired) -> dict[str, float | list[float]]:
        return {"label": float(row.label)}

    @property
    @abstractmethod
    def reference_point(self) -> float:
        """The number of the step, in the units of `rewards`."""

    @abstractmethod
    def rewards(self, log_ratios: Tensor) -> Tensor:
        """(B,) what stands against the reference point."""

    @abstractmethod
    def losses(self, log_ratios: Tensor, good: Tensor) -> Tensor:
        """(B,) with gradient."""

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        rows = batch.rows(batch.usable)
        ratios, good = log_ratios(rows.responses["completion"]), rows.values["label"] > 0.5
        n = self.counts(batch)["unpaired"]
        rewards = self.rewards(ratios.detach())
        ahead = rewards > self.reference_point
        sums = {
            "unpaired/reward_good": (rewards[good].sum(), good.sum()),
            "unpaired/reward_bad": (rewards[~good].sum(), (~good).sum()),
            "unpaired/accuracy": ((ahead == good).sum(), n),
            "unpaired/good_share": (good.sum(), n),
            "unpaired/reference_point": (n * self.reference_point, n),
        }
        return {"unpaired": LossSum(self.losses(ratios, good).sum(), "sequences", n, sums)}
