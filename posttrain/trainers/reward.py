"""The `reward` shell: a sequence classifier that scores the responses of a row, or their steps, on TRL's RewardTrainer.

The classifier's own forward finds the last token of a row by the pad id, as whoever loads the trained folder will.
Knows no method.
"""

from __future__ import annotations

import torch
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from posttrain.methods.base import StepwiseMethod
from posttrain.models.collate import Tensors
from posttrain.models.value_proof import prove_values
from posttrain.objectives.batch import PreferenceBatch
from posttrain.trainers.critic import base_of
from posttrain.trainers.responses import ResponseShell
from posttrain.trainers.shell import RunParts
from posttrain.trl_compat import RewardHost


class RewardShell(ResponseShell, RewardHost, RewardTrainer):
    """Trains on fixed rows of responses; `TokenBatch.scores` holds the classifier's outputs."""

    Arguments = RewardConfig

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.judges_steps = isinstance(self.method, StepwiseMethod)
        if self.judges_steps:
            classifier = base_of(self.accelerator.unwrap_model(self.model))
            prove_values(classifier, classifier.score, where="model.path")

    def step_batches(self, step: int) -> list[Tensors]:
        self.parts.mixture.begin_step(self.means.add, self.tracker.message, step)
        rows = self.order.share(step, self.rank, self.world)
        rows = sorted(rows, key=lambda row: (self.rows[row].length, row))  # little padding; changes no gradient
        size = self.args.per_device_train_batch_size
        return [self.row_tensors(rows[start : start + size]) for start in range(0, len(rows), size)]

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
            self.ledger.trained(int(inputs["attention_mask"].sum()), pixels=self.pixels(inputs))
            self.parts.mixture.count(self.ledger, inputs)
        responses = self.responses(inputs, scores=scores)
        if scores is not None:
            self.record_sources(inputs, responses, lambda response: response.scores.detach())
        return PreferenceBatch(responses, self.values(inputs))
