"""Hands a completion to the checker of the procedural task that the problem came from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.config.tasks import TASKS
from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.verdict import Status, Verdict


class ProceduralVerifier:
    """Strict: the format is exact, every step right and the answer right. Lenient: the number after the last `#`.
    Description: what is said to be in the picture, whatever follows.
    """

    name = "procedural"
    outcome = True

    class Config(VerifierConfig):
        """The verifier of the procedural task that the problem came from."""

        type: Literal["procedural"] = "procedural"
        profile: Literal["strict", "lenient", "description"] = Field(
            "strict",
            description="strict checks every step, lenient the answer, description what a picture is said to show",
        )

    def __init__(self, config: ProceduralVerifier.Config) -> None:
        self.profile = config.profile

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        task = TASKS.get(problem.meta.get("task"))
        if task is None:
            return Verdict(Status.BAD_REFERENCE, None, "the problem is not of a procedural task")
        check = getattr(task, f"check_{self.profile}", None)
        if check is None:
            return Verdict(Status.BAD_REFERENCE, None, f"task {task.name} has no descriptions to check")
        return check(problem, completion)
