"""Whether a completion has a given form. Shapes the reward; says nothing of the answer."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.pattern import compile_pattern
from posttrain.verifiers.verdict import Status, Verdict


class FormatVerifier:
    """Correct if the pattern matches the whole completion; the dot matches newlines too.

    A pattern that takes exponential time is stopped by the pool's time limit only.

    Raises:
        RecipeError: a pattern that is no regular expression.
    """

    name = "format"
    outcome = False

    class Config(VerifierConfig):
        """Shaping only: whether the completion matches a pattern as a whole."""

        type: Literal["format"] = "format"
        pattern: str = Field(
            description="regular expression that the whole completion must match (dot matches newline)"
        )

        @property
        def judges_outcome(self) -> bool:
            return False

    def __init__(self, config: FormatVerifier.Config) -> None:
        self.pattern = compile_pattern(config.pattern, where="verifier.format.pattern", flags=re.DOTALL, groups=0)

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        if self.pattern.fullmatch(completion):
            return Verdict(Status.CORRECT, 1.0)
        return Verdict(Status.WRONG, 0.0, "does not match")
