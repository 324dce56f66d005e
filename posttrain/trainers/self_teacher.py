"""The policy as its own teacher (`companions.SelfTeacher`): what it reads, with which weights, and what it says.

The completion is the same ids behind both prompts, so what the teacher says of its rows is moved to the policy's rows
by the place of a token within the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from posttrain.data.known_traces import TraceBook
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem, Sample
from posttrain.methods.companions import Attempt, SelfTeacher
from posttrain.models.collate import Tensors, collate
from posttrain.models.full_divergence import ReferenceStates
from posttrain.models.reference import Reference
from posttrain.tracking.ledger import Role
from posttrain.trainers.rollout_step import answer_ids
from posttrain.trainers.scoring import ScoringModel

TOLD = "told_"
"""Prefix of the tensors that hold the teacher's rows: their `ids`, `attention_mask` and `mask`."""


class OwnTeacher(ScoringModel):
    """Asks the policy about its own completions behind another prompt.

    Args:
        wanted: what the teacher is told, and what is taught.
        renderer, positions: of the policy; what would not fit its positions is left out.
        problems: by id.
        traces: that the method may tell of.
        model: scores the teacher's rows.
        role: the model's, in the ledger.
        within: context in which its head has the teacher's weights.
    """

    def __init__(
        self,
        wanted: SelfTeacher,
        renderer: Renderer,
        positions: int | None,
        problems: dict[str, Problem],
        traces: TraceBook,
        model: Reference,
        role: Role,
        within: Callable[[], AbstractContextManager],
    ) -> None:
        super().__init__(model, role)
        self.wanted, self.renderer, self.positions = wanted, renderer, positions
        self.problems, self.traces, self.within = problems, traces, within

    def rows(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Rollouts, whole groups of them, without what is not taught under their loss masks; and the teacher's rows.

        Both of a row have the same number of trained tokens: none where the teacher is told nothing, or its prompt
        leaves the completion no room.
        """
        prompts: list[list[int] | None] = [None] * len(samples)
        groups: dict[int, list[int]] = {}
        for number, sample in enumerate(samples):
            groups.setdefault(sample.group, []).append(number)
        for numbers in groups.values():
            for number, ids in zip(numbers, self._told([samples[i] for i in numbers]), strict=True):
                prompts[number] = ids
        pairs = [self._pair(sample, ids) for sample, ids in zip(samples, prompts, strict=True)]
        return [own for own, _ in pairs], [told for _, told in pairs]

    def _told(self, group: Sequence[Sample]) -> list[list[int] | None]:
        problem = self.problems[group[0].problem_id]
        attempts = [Attempt(self.renderer.text(answer_ids(sample)), sample.outcome) for sample in group]
        traces = self.traces.of(problem, group[0].ids[: group[0].prompt_length])
        told = self.wanted.told(problem, traces, attempts)
        return [None if each is None else self.renderer.prompt_ids(replace(problem, prompt=each)) for each in told]

    def _pair(self, sample: Sample, prompt: list[int] | None) -> tuple[Sample, Sample]:
        own = sample.ids[: sample.prompt_length]
        answer = sample.ids[len(own) :]
        if prompt is None or (self.positions is not None and len(prompt) + len(answer) > self.positions):
            return (replace(sample, loss_mask=[0] * len(sample.ids)),) * 2
        mask = sample.loss_mask[len(own) :]
        skipped = self.wanted.skip_tokens
        first = mask.index(1) if 1 in mask else 0
        mask = [kept if place >= first + skipped else 0 for place, kept in enumerate(mask)]
        told = Sample([*prompt, *answer], [0] * len(prompt) + mask, sample.origin, sample.problem_id)
        return replace(sample, loss_mask=[0] * len(own) + mask), told

    def tensors(self, told: Sequence[Sample], pad_id: int) -> Tensors:
        """The teacher's rows of a micro-batch."""
        return {TOLD + name: value for name, value in collate(told, pad_id).items()}

    def read(self, inputs: Tensors) -> int:
        return int(inputs[TOLD + "attention_mask"].sum())

    def token_logps(self, inputs: Tensors, device: torch.device) -> Tensor:
        return _moved(super().token_logps(inputs, device), inputs, device)

    def token_states(self, inputs: Tensors, device: torch.device) -> ReferenceStates:
        states = super().token_states(inputs, device)

        def logps(hidden: Tensor) -> Tensor:
            with self.within():
                return states.logps(hidden)

        return ReferenceStates(_moved(states.hidden, inputs, device), logps)

    def _rows(self, inputs: Tensors, device: torch.device, prefix: str = TOLD) -> list[Tensor]:
        return super()._rows(inputs, device, prefix)


def _moved(found: Tensor, inputs: Tensors, device: torch.device) -> Tensor:
    """From the places under the mask of the teacher's rows to those of the policy's, row by row in order."""
    mask = inputs["mask"].to(device)
    placed = found.new_zeros(*mask.shape, *found.shape[2:])
    placed[mask] = found[inputs[TOLD + "mask"].to(device)]
    return placed
