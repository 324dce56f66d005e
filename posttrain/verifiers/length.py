"""Scores of length. They shape the reward; they say nothing of the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.verdict import Answer, Status, Verdict


class LengthVerifier:
    """A score between 0 and 1 that depends on the length, and with `cosine` on the outcome.

    `soft_overlong` is the penalty of DAPO (2503.14476, eq. 13) plus one: 1 up to `max - buffer`, then falling linearly
    to 0 at `max`, and 0 beyond. `cosine` is the reward of 2502.03373 on a scale from 0 to 1: along half a
    cosine from the score at length 0 to the one at `max`, separately for right and wrong answers; 0 beyond `max`.
    Where the outcome is unknown, so is the cosine score.
    """

    name = "length"
    outcome = False

    class Config(VerifierConfig):
        """Shaping only: a score that falls with the length of the completion."""

        type: Literal["length"] = "length"
        shape: Literal["soft_overlong", "cosine"] = Field(
            "soft_overlong", description="1 up to max - buffer, then linearly to 0 at max; or a cosine by outcome"
        )
        max: int = Field(ge=1, description="length at which the score ends")
        buffer: int | None = Field(None, ge=1, description="length over which the score falls (soft_overlong)")
        unit: Literal["tokens", "words", "characters"] = Field("tokens", description="what is counted")
        correct: tuple[float, float] = Field(
            (1.0, 0.5), description="scores at length 0 and max of right answers (cosine)"
        )
        wrong: tuple[float, float] = Field(
            (0.0, 0.5), description="scores at length 0 and max of wrong answers (cosine)"
        )

        @property
        def judges_outcome(self) -> bool:
            return False

        @model_validator(mode="after")
        def _of_the_shape(self) -> LengthVerifier.Config:
            if self.shape == "soft_overlong" and self.buffer is None:
                raise ValueError("soft_overlong needs `buffer`: the length over which the score falls")
            if self.buffer is not None and self.buffer > self.max:
                raise ValueError(f"buffer {self.buffer} is larger than max {self.max}")
            for key, ends in (("correct", self.correct), ("wrong", self.wrong)):
                if not all(0.0 <= end <= 1.0 for end in ends):
                    raise ValueError(f"{key} {list(ends)} must be scores from 0 to 1; `weight` scales them")
            return self

        def idle_keys(self) -> Iterator[tuple[str, str]]:
            for key in ("correct", "wrong") if self.shape == "soft_overlong" else ("buffer",):
                yield key, f"shape {self.shape} does not have it"

    def __init__(self, config: LengthVerifier.Config) -> None:
        self.config = config

    def verify(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict for each answer.

        Raises:
            ValueError: lengths in tokens are wanted and not known.
        """
        return [self._verdict(answer) for answer in answers]

    def _verdict(self, answer: Answer) -> Verdict:
        config, length = self.config, self._length(answer)
        if config.shape == "soft_overlong":
            score = min(1.0, max(0.0, (config.max - length) / config.buffer))
        elif not answer.outcome.status.known:
            return Verdict(answer.outcome.status, None, "the outcome is unknown")
        else:
            start, end = config.correct if answer.outcome.status is Status.CORRECT else config.wrong
            share = length / config.max
            score = end + (start - end) * (1 + math.cos(math.pi * share)) / 2 if share <= 1 else 0.0
        return Verdict(Status.CORRECT if score == 1.0 else Status.WRONG, score, f"{length} {config.unit}")

    def _length(self, answer: Answer) -> int:
        if self.config.unit == "characters":
            return len(answer.text)
        if self.config.unit == "words":
            return len(answer.text.split())
        if answer.tokens is None:
            raise ValueError("the length verifier counts tokens, and whoever calls the judge gave no token counts")
        return answer.tokens
