"""The scorers of `reasoning-gym`."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.errors import StackError
from posttrain.verifiers.pattern import compile_pattern, last_group
from posttrain.verifiers.verdict import Status, Verdict

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class GymVerifier:
    """The score that the problem's generator gives the answer, kept within [0, 1]. Correct if it is 1, else wrong.

    The answer is the first group of the last match of `pattern`; without a pattern the last `<answer>` tag, or the
    last line that is not empty.

    Some of these scorers evaluate the answer as Python code (string_insertion, spiral_matrix, binary_matrix, and those
    that parse formulas with sympy, such as the integrations). The worker is no sandbox: use them with models you trust.

    Raises:
        RecipeError: a pattern that is no regular expression or has no group.
        StackError: reasoning-gym is not installed.
    """

    name = "reasoning_gym"
    outcome = True

    class Config(VerifierConfig):
        """The scorer of the reasoning-gym generator that the problem came from."""

        type: Literal["reasoning_gym"] = "reasoning_gym"
        names_answers: ClassVar[bool] = True
        pattern: str | None = Field(
            None, description="answer within the completion; default: <answer> tag, else the last line"
        )

    def __init__(self, config: GymVerifier.Config) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise StackError("reasoning_gym is not installed", hint="pip install reasoning-gym")
        self.pattern = None
        if config.pattern is not None:
            self.pattern = compile_pattern(config.pattern, where="verifier.reasoning_gym.pattern")

    def prepare(self) -> None:
        """Import the package, which takes a second, before a clock runs."""
        import reasoning_gym  # noqa: F401

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        if "reasoning_gym" not in problem.meta:
            return Verdict(Status.BAD_REFERENCE, None, "the problem is not of a reasoning-gym generator")
        answer = self._answer(completion)
        if not answer:
            return Verdict(Status.NO_ANSWER, 0.0)
        meta = problem.meta
        scorer = _scorer(meta["reasoning_gym"], meta["seed"], json.dumps(meta["config"], sort_keys=True))
        score = min(1.0, max(0.0, float(scorer.score_answer(answer, meta["entry"]))))
        return Verdict(Status.CORRECT if score == 1.0 else Status.WRONG, score, answer, answer)

    def _answer(self, completion: str) -> str | None:
        if self.pattern is not None:
            return last_group(self.pattern, completion)
        tagged = last_group(_TAG, completion)
        return tagged if tagged is not None else completion.strip().rpartition("\n")[2].strip()


@lru_cache(maxsize=32)
def _scorer(generator: str, seed: int, config: str) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(generator, seed=seed, size=1, **json.loads(config))
