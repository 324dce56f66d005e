"""String equality."""

from __future__ import annotations

from posttrain.config.schema import ExactVerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.pattern import compile_pattern, last_group
from posttrain.verifiers.verdict import Status, Verdict


class ExactVerifier:
    """Correct if the completion (or the first group of the last match of `pattern`) is the reference.

    Both are stripped. Nothing else is changed: no Unicode normalisation, no folding of white space. An empty answer
    is no answer.

    Raises:
        RecipeError: a pattern that is no regular expression or has no group.
    """

    name = "exact"
    outcome = True

    def __init__(self, config: ExactVerifierConfig) -> None:
        self.ignore_case = config.ignore_case
        self.pattern = None
        if config.pattern is not None:
            self.pattern = compile_pattern(config.pattern, where="verifier.exact.pattern")

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        if problem.reference is None:
            return Verdict(Status.BAD_REFERENCE, None, "no reference")
        answer = completion.strip() if self.pattern is None else last_group(self.pattern, completion)
        if not answer:
            return Verdict(Status.NO_ANSWER, 0.0)
        reference = problem.reference.strip()
        same = answer.casefold() == reference.casefold() if self.ignore_case else answer == reference
        return Verdict(Status.CORRECT if same else Status.WRONG, float(same), answer, answer)
