"""A reward model that follows principles, asked by those that the recipe chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.principles import TEMPLATE, Principle, PrincipleTemplate
from posttrain.data.principles import Drawn, draw_principles, with_principles
from posttrain.data.sample import Problem
from posttrain.verifiers.reward_model import RewardModelVerifier
from posttrain.verifiers.verdict import Answer, Verdict


class PrincipledVerifier(RewardModelVerifier):
    """As `reward_model`, with principles in the prompt that the model reads: those of a prompt are always the same."""

    name = "principled"

    class Config(RewardModelVerifier.Config):
        """A reward model of the method `salmon`, run in the trainer's process on whole batches."""

        type: Literal["principled"] = "principled"  # type: ignore[assignment]  # a verifier of its own
        principles: dict[str, Principle] = Field(min_length=1, description="name -> {text, negative}, as in training")
        template: PrincipleTemplate = Field(TEMPLATE, description="of the prompt, as in training")
        sampled: int | None = Field(None, ge=1, description="so many for each prompt, at random; default: all of them")
        negated: list[str] = Field([], description="names of principles whose contrary is asked for")
        negate: float = Field(0.0, ge=0, le=1, description="probability that another one is negated, by prompt")
        draw_seed: int = Field(0, ge=0, description="of what is drawn")

        @model_validator(mode="after")
        def _of_these(self) -> PrincipledVerifier.Config:
            if unknown := sorted(set(self.negated) - set(self.principles)):
                raise ValueError(f"no principle {unknown[0]!r} to negate; there are {', '.join(self.principles)}")
            if self.sampled is not None and self.sampled > len(self.principles):
                raise ValueError(f"sampled is {self.sampled}, and there are {len(self.principles)} principles")
            return self

        def idle_keys(self) -> Iterator[tuple[str, str]]:
            yield from super().idle_keys()
            if self.sampled is None and self.negate == 0:
                yield "draw_seed", "nothing is drawn with all principles and negate 0"

    config: PrincipledVerifier.Config

    def verify(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer. Errors as for `RewardModelVerifier`.

        Raises:
            DataError: also a chat that does not end with a user message.
        """
        c = self.config
        read = [with_principles(problem, c.principles, self.asked(problem), c.template) for problem in problems]
        return super().verify(read, answers)

    def asked(self, problem: Problem) -> Drawn:
        """The principles that the answers to a problem are judged by."""
        c, names = self.config, list(self.config.principles)
        drawn = draw_principles(names, c.sampled or len(names), c.negate, f"{c.draw_seed}/{problem.id}")
        return {name: negative or name in c.negated for name, negative in drawn.items()}
