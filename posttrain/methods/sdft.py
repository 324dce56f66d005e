"""SDFT: the policy distils itself: its teacher is the policy with more in its prompt than the student sees.

| variant | parameters |
| --- | --- |
| SDFT (arXiv 2601.19897) | the defaults: an expert's trace in the prompt of a slow average of the policy, reverse KL |
| OPSD (arXiv 2601.18734) | `teacher: start`, `beta: 0.5` |
| SDPO (arXiv 2601.20802) | `context: success`, `average_rate: 0.05`, `beta: 0.5`, `objective: top_k`, by the policy |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Message, Problem
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import Scored
from posttrain.methods.companions import Attempt, SelfTeacher
from posttrain.methods.distilled import Distilled, DistilledConfig
from posttrain.objectives.aggregation import count
from posttrain.objectives.batch import LossSum, TokenBatch

PLACES = ("{prompt}", "{context}")
"""What a template must hold."""


class SDFTConfig(DistilledConfig):
    name: Literal["sdft"] = "sdft"
    context: Literal["trace", "reference", "success"] = Field(
        "trace",
        description="what the teacher sees: the first trace of the problem, its gold answer, or the first right "
        "completion among the others of the group",
    )
    template: str = Field(
        "{prompt}\n\nOne right answer to this task is:\n\n{context}\n\nAnswer the task in your own words.",
        description="the teacher's prompt, of {prompt} and {context}; of a chat, its last user message",
    )
    teacher: Literal["live", "start", "average"] = Field(
        "average", description="the policy as it is, as it was before the first step, or a moving average of it"
    )
    average_rate: float = Field(
        0.01, gt=0, le=1, description="by which the average moves to the policy after each optimizer step"
    )
    taught: Literal["all", "right", "wrong"] = Field("all", description="completions that are trained on, by verdict")
    skip_tokens: int = Field(0, ge=0, description="tokens at the start of a completion that are not trained on")
    objective: Literal["policy_gradient", "full", "top_k"] = Field(
        "full", description="log-ratio on the sampled token, or a divergence over the vocabulary or a part"
    )

    @model_validator(mode="after")
    def _of_the_teacher(self) -> SDFTConfig:
        missing = [place for place in PLACES if place not in self.template]
        if missing:
            raise ValueError(f"template must hold {' and '.join(PLACES)}; {' and '.join(missing)} is not there")
        if self.teacher != "average" and "average_rate" in self.model_fields_set:
            raise ValueError(f"average_rate has no effect with teacher {self.teacher}: set teacher: average")
        return self


class SDFT(Distilled[SDFTConfig]):
    Config = SDFTConfig
    paper = "Self-distillation fine-tuning, arXiv 2601.19897; OPSD, 2601.18734; SDPO, 2601.20802"

    @property
    def needs(self) -> Needs:
        c = self.config
        compares = c.context == "success" or c.outcome_coef > 0
        rate = {"live": 1.0, "start": 0.0, "average": c.average_rate}[c.teacher]
        return Needs(
            data=("prompts", "traces") if c.context == "trace" else ("prompts",),
            rollouts=True,
            verifier=compares or c.taught != "all",
            reference=c.teacher == "start",
            min_samples_per_prompt=2 if compares else 1,
            companions=(SelfTeacher(rate, self.told, c.skip_tokens), *self.compared),
        )

    def bind(self, renderer: Renderer, seed: int) -> None:
        self._text = renderer.text

    def told(
        self, problem: Problem, traces: Sequence[KnownTrace], group: Sequence[Attempt]
    ) -> list[str | tuple[Message, ...] | None]:
        return [self._told(problem, traces, group, number) for number in range(len(group))]

    def _told(
        self, problem: Problem, traces: Sequence[KnownTrace], group: Sequence[Attempt], number: int
    ) -> str | tuple[Message, ...] | None:
        outcome = group[number].outcome
        if self.config.taught != "all" and (outcome is None or (outcome >= 1) != (self.config.taught == "right")):
            return None
        context: str | None = problem.reference
        if self.config.context == "trace":
            right = [trace for trace in traces if trace.outcome in (None, 1.0)]
            context = self._text(right[0].ids) if right else None
        elif self.config.context == "success":
            others = (
                each
                for place, each in enumerate(group)
                if place != number and each.outcome is not None and each.outcome >= 1
            )
            context = next((each.text for each in others), None)
        return None if context is None else filled(self.config.template, problem.prompt, context)

    def keep(self, scored: Scored) -> Tensor:
        """All rows where nothing is verified; the shell leaves out those that nothing is told of."""
        return scored.known if self.needs.verifier else torch.ones_like(scored.known)

    def counts(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"policy": count(batch.mask, self.config.aggregation)}

    def loss(self, batch: TokenBatch) -> dict[str, LossSum]:
        losses, seen = self.on_samples(batch)
        return {"policy": self.term(losses, seen, batch.mask)}


def filled(template: str, prompt: str | tuple[Message, ...], context: str) -> str | tuple[Message, ...]:
    """The teacher's prompt. Of a chat it is the last user message that is put into the template."""
    if isinstance(prompt, str):
        return re.sub(
            "|".join(map(re.escape, PLACES)), lambda place: (prompt, context)[PLACES.index(place[0])], template
        )
    last = max(number for number, message in enumerate(prompt) if message["role"] == "user")
    message = prompt[last] | {"content": filled(template, prompt[last]["content"], context)}
    return (*prompt[:last], message, *prompt[last + 1 :])
