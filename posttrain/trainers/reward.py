"""The `reward` shell: a sequence classifier that scores the responses of a row, or their steps, on TRL's RewardTrainer.

The classifier's own forward finds the last token of a row by the pad id, as whoever loads the trained folder will.
Knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import RewardConfig, RewardTrainer

from posttrain.data.fitted import PreferenceRow
from posttrain.methods.base import PreferenceMethod, StepwiseMethod
from posttrain.models.collate import VALUE, Tensors, collate
from posttrain.models.value_proof import prove_values
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.trainers.critic import base_of
from posttrain.trainers.mixture import SOURCE
from posttrain.trainers.order import StagedOrder
from posttrain.trainers.shell import RunParts, Shell
from posttrain.trl_compat import RewardHost


class RewardShell(Shell, RewardHost, RewardTrainer):
    """Trains on fixed rows of responses; `TokenBatch.scores` holds the classifier's outputs."""

    Arguments = RewardConfig

    method: PreferenceMethod

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.rows: Sequence[PreferenceRow] = parts.items
        self.roles = tuple(self.rows[0].responses)
        self.judges_steps = isinstance(self.method, StepwiseMethod)
        if self.judges_steps:
            classifier = base_of(self.accelerator.unwrap_model(self.model))
            prove_values(classifier, classifier.score, where="model.path")
        stages = self.method.order([item.row for item in self.rows])
        how = (parts.plan.units_per_step, parts.plan.max_steps, self.args.seed, parts.mixture.order)
        self.order = StagedOrder(stages, *how)

    def step_batches(self, step: int) -> list[Tensors]:
        self.parts.mixture.begin_step(self.means.add, self.tracker.message, step)
        rows = self.order.share(step, self.accelerator.process_index, self.accelerator.num_processes)
        rows = sorted(rows, key=lambda row: (self.rows[row].length, row))  # little padding; changes no gradient
        size = self.args.per_device_train_batch_size
        return [self._collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _collate(self, rows: list[int]) -> Tensors:
        """Role by role, as in the `preference` shell."""
        samples = [self.rows[row].responses[role] for role in self.roles for row in rows]
        ids = [sample.problem_id for sample in samples]
        tensors = self.parts.mixture.mark(collate(samples, self.parts.pad_id), ids)
        for name in self.rows[rows[0]].values:
            values = [torch.tensor(self.rows[row].values[name]) for row in rows]
            tensors[VALUE + name] = pad_sequence(values, batch_first=True) if values[0].dim() else torch.stack(values)
        return tensors

    def _scored(self, model: torch.nn.Module, inputs: Tensors) -> Tensor:
        """(B,) of the rows, or (B, T) of the states behind the tokens: the head's outputs before the classifier takes
        the last one."""
        of_tokens: list[Tensor] = []
        head = base_of(self.accelerator.unwrap_model(model)).score
        hook = head.register_forward_hook(lambda _, arguments, output: of_tokens.append(output))
        try:
            with self.accelerator.autocast():
                found = model(input_ids=inputs["ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        finally:
            hook.remove()
        return (of_tokens[0] if self.judges_steps else found.logits)[..., 0].float()

    def method_batch(self, inputs: Tensors, model: torch.nn.Module | None) -> PreferenceBatch:
        scores = None
        if model is not None:
            scores = self._scored(model, inputs)
            self.ledger.trained(int(inputs["attention_mask"].sum()))
            self.parts.mixture.count(self.ledger, inputs)
        size = len(inputs["ids"]) // len(self.roles)
        parts = [slice(number * size, (number + 1) * size) for number in range(len(self.roles))]
        responses = {
            role: TokenBatch(mask=inputs["mask"][part], scores=None if scores is None else scores[part])
            for role, part in zip(self.roles, parts, strict=True)
        }
        if scores is not None and SOURCE in inputs and {"chosen", "rejected"} <= set(responses):
            difference = responses["chosen"].scores.detach() - responses["rejected"].scores.detach()
            self.record(self.parts.mixture.accuracy(inputs, difference))
        values = {name.removeprefix(VALUE): value for name, value in inputs.items() if name.startswith(VALUE)}
        return PreferenceBatch(responses, values)
