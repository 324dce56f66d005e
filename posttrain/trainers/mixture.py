"""Several sources in one run: which rows belong to which, how they are drawn, and what is logged of each.

Imports without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from posttrain.config.batch import BatchPlan
from posttrain.config.mixtures import parts, source_of, stages
from posttrain.config.needs import Needs
from posttrain.config.schema import Recipe
from posttrain.data.order import MixtureOrder
from posttrain.data.preparation import section_of
from posttrain.data.sample import Sample
from posttrain.errors import DataError
from posttrain.evaluation.pair_accuracy import TIE
from posttrain.lazy import Tensor

if TYPE_CHECKING:
    from posttrain.models.collate import Tensors
    from posttrain.tracking.ledger import ComputeLedger
    from posttrain.tracking.metrics import Add

SOURCE = "source"
"""In a micro-batch: the number of each row's source."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sources of a run.

    Attributes:
        names: of the sources that rows are left of; none where there is one source alone, or traces.
        order: draws by weight; None where all rows are shuffled together.
    """

    names: Sequence[str] = ()
    order: MixtureOrder | None = None

    @classmethod
    def of(cls, recipe: Recipe, needs: Needs, plan: BatchPlan, items: Mapping[str, Sequence[int]]) -> Mixture:
        """The mixture of a run.

        Args:
            recipe, needs, plan: of the run.
            items: the numbers of the fitted rows of each source that there are any of.

        Raises:
            DataError: a source has no row left, or all sources end before the run does.
        """
        section = section_of(recipe, needs)
        sources = parts(getattr(recipe.data, section), section)
        if len(sources) == 1 or section == "traces":  # which are put together
            return cls()
        if empty := [name for name, _ in sources if not items.get(name)]:
            raise DataError("no row of the source is left", where=f"data.{section}: {empty[0]}")
        rows = {name: items[name] for name, _ in sources}
        weights = stages(getattr(recipe.data, section), section)
        if weights is None:
            return cls(list(rows), None)
        limits = {
            name: None if source.max_epochs is None else ceil(source.max_epochs * len(rows[name]))
            for name, source in sources
        }
        order = MixtureOrder(rows, weights, plan.units_per_step, recipe.seed, limits)
        try:
            order.drawn(plan.max_steps)
        except ValueError as error:
            raise DataError(
                f"{error}, and the run has {plan.max_steps} steps",
                where=f"data.{section}",
                hint="raise max_epochs of a source, or lower training.max_steps",
            ) from error
        return cls(list(rows), order)

    def lines(self, steps: int) -> list[str]:
        """What a run of so many steps takes of each source, for people."""
        if self.order is None:
            return []
        drawn, passes = self.order.drawn(steps), self.order.passes(steps)
        total = max(sum(drawn.values()), 1)
        return [
            f"source {name}: {self._weight_in_words(name, steps)}; over the run {drawn[name]:,} rows "
            f"({drawn[name] / total:.1%}), {passes[name]:.2f} passes"
            for name in self.names
        ]

    def _weight_in_words(self, name: str, steps: int) -> str:
        shares = ((start, self.order.weights(start)[name]) for start in self.order.starts if start < steps)
        return "weight " + ", ".join(
            f"{share:.1%}" + f" from step {start + 1} on" * (start > 0) for start, share in shares
        )

    def begin_step(self, add: Add, say: Callable[[str], None], step: int) -> None:
        """Log the passes over each source, and say which one ends in this step of the order."""
        if self.order is None:
            return
        after = self.order.drawn(step + 1)
        for name, passes in self.order.passes(step + 1).items():
            add(f"source/{name}/epoch", passes, 1)
            add(f"source/{name}/share", after[name] / (self.order.per_step * (step + 1)), 1)
        if step in self.order.starts[1:]:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in self.order.weights(step).items())
            say(f"from step {step + 1} on the sources have these weights: {shares}")
        for name in self.order.ends(step):
            say(f"source {name} ends with step {step + 1}: {after[name]:,} rows were drawn of it")

    def judged(self, add: Add, rows: Sequence[Sample]) -> None:
        """Log reward and accuracy of each source among completions."""
        for row in rows:
            name = source_of(row.problem_id)
            if name not in self.names:
                continue
            if row.reward is not None:
                add(f"source/{name}/reward", row.reward, 1)
            if row.outcome is not None:
                add(f"source/{name}/accuracy", row.outcome, 1)

    def mark(self, tensors: Tensors, ids: Sequence[str]) -> Tensors:
        """A micro-batch with the sources of its rows; -1 for rows of none of them, such as traces beside rollouts."""
        import torch

        if not self.names:
            return tensors
        numbers = {name: number for number, name in enumerate(self.names)}
        return tensors | {SOURCE: torch.tensor([numbers.get(source_of(id), -1) for id in ids])}

    def count(self, ledger: ComputeLedger, inputs: Tensors) -> None:
        """Count the tokens of each source that a micro-batch passes forward and backward."""
        tokens = inputs["attention_mask"].sum(dim=1)
        for number, name in enumerate(self.names):
            ledger.of_source(name, int(tokens[inputs[SOURCE] == number].sum()))

    def accuracy(self, inputs: Tensors, difference: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each source the share of rows in a micro-batch whose chosen response is ahead of the rejected one.

        Args:
            inputs: the micro-batch, whose first rows are the chosen responses.
            difference: (B,) chosen minus rejected.
        """
        right, size = difference > TIE, len(difference)
        own = {name: inputs[SOURCE][:size] == number for number, name in enumerate(self.names)}
        return {f"source/{name}/accuracy": ((right & rows).sum(), rows.sum()) for name, rows in own.items()}

    def losses(self, inputs: Tensors, logps: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum of the negative log-likelihood and number of trained tokens of each source in a micro-batch."""
        nll, mask = -(logps.detach() * inputs["mask"]).sum(dim=1), inputs["mask"].sum(dim=1)
        own = {name: inputs[SOURCE] == number for number, name in enumerate(self.names)}
        return {f"source/{name}/nll": (nll[rows].sum(), mask[rows].sum()) for name, rows in own.items()}
