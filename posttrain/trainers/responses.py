"""What the shells of rows of responses share (`preference`, `reward`): their order, and micro-batches role by role."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.data.fitted import PreferenceRow
from posttrain.data.order import StagedOrder
from posttrain.methods.base import PreferenceMethod
from posttrain.models.collate import VALUE, Tensors, collate
from posttrain.objectives.batch import TokenBatch
from posttrain.trainers.mixture import SOURCE
from posttrain.trainers.shell import RunParts, Shell


class ResponseShell(Shell):
    """Rows of responses in stages.

    Attributes:
        rows: all of them.
        roles: of the responses of each.
    """

    method: PreferenceMethod

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.rows: Sequence[PreferenceRow] = parts.items
        self.roles = tuple(self.rows[0].responses)
        stages = self.method.order([item.row for item in self.rows])
        plan = parts.plan
        assert plan.max_steps is not None  # known once the rows are counted
        self.order = StagedOrder(stages, plan.units_per_step, plan.max_steps, self.args.seed, parts.mixture.order)

    def row_tensors(self, rows: Sequence[int]) -> Tensors:
        """A micro-batch role by role: rows 0..n-1 of the first role, then of the second, and so on."""
        samples = [self.rows[row].responses[role] for role in self.roles for row in rows]
        ids = [self.rows[row].row.problem.id for row in rows] * len(self.roles)
        tensors = self.parts.mixture.mark(collate(samples, self.parts.pad_id), ids)
        for name in self.rows[rows[0]].values:
            values = [torch.tensor(self.rows[row].values[name]) for row in rows]
            tensors[VALUE + name] = pad_sequence(values, batch_first=True) if values[0].dim() else torch.stack(values)
        return tensors

    def responses(self, inputs: Tensors, **further: Tensor | None) -> dict[str, TokenBatch]:
        """Role -> its rows of a micro-batch.

        Args:
            further: fields of `TokenBatch` beside the mask, each with all rows of `inputs`, or None.
        """
        size, given = len(inputs["ids"]) // len(self.roles), {"mask": inputs["mask"], **further}
        found: dict[str, TokenBatch] = {}
        for number, role in enumerate(self.roles):
            part = slice(number * size, (number + 1) * size)
            fields: dict[str, Any] = {name: None if t is None else t[part] for name, t in given.items()}
            found[role] = TokenBatch(**fields)
        return found

    def values(self, inputs: Tensors) -> Tensors:
        """What the loss reads of the rows beside their tokens."""
        return {name.removeprefix(VALUE): value for name, value in inputs.items() if name.startswith(VALUE)}

    def record_sources(
        self, inputs: Tensors, responses: dict[str, TokenBatch], score: Callable[[TokenBatch], Tensor]
    ) -> None:
        """Of each source the share of rows whose chosen response scores higher than the rejected one."""
        if SOURCE in inputs and {"chosen", "rejected"} <= set(responses):
            difference = score(responses["chosen"]) - score(responses["rejected"])
            self.record(self.parts.mixture.accuracy(inputs, difference))
