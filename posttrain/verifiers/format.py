"""Whether a completion has a given form. Shapes the reward; says nothing of the answer."""

from __future__ import annotations

import re

from posttrain.config.schema import FormatVerifierConfig
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

    def __init__(self, config: FormatVerifierConfig) -> None:
        self.pattern = compile_pattern(config.pattern, where="verifier.format.pattern", flags=re.DOTALL, groups=0)

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        if self.pattern.fullmatch(completion):
            return Verdict(Status.CORRECT, 1.0)
        return Verdict(Status.WRONG, 0.0, "does not match")
