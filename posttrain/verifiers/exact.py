"""String equality."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers import references
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

    class Config(VerifierConfig):
        """String equality after stripping."""

        type: Literal["exact"] = "exact"
        needs_reference: ClassVar[bool] = True
        names_answers: ClassVar[bool] = True
        pattern: str | None = Field(
            None, description="regular expression whose first group of the last match is the answer"
        )
        ignore_case: bool = Field(False, description="upper and lower case are the same")

        def gold(self, problem: Problem) -> str | None:
            return None if self.pattern is not None else problem.reference or ""

        def excludes(self, one: Problem, other: Problem) -> bool:
            return references.differ(one, other)

    def __init__(self, config: ExactVerifier.Config) -> None:
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
