"""What every verifier's section says. Each verifier has its own beside its class: `Config`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field, SerializeAsAny, WrapValidator

from posttrain.config.registered import RegisteredSection, by_type
from posttrain.data.sample import Problem
from posttrain.verifiers import VERIFIERS


class VerifierConfig(RegisteredSection):
    """Base of all verifier sections. Subclasses set `type` to a Literal, and say here what others must know of them.

    Class attributes:
        needs_reference: it compares with a gold answer, so every problem must have one.
        names_answers: its verdicts have an `answer`, so that answers can vote (maj@k).
    """

    weight: float = Field(1.0, description="factor of the score in the reward")
    gate: bool = Field(False, description="the reward is 0 unless this verifier says correct")

    table = VERIFIERS
    needs_reference: ClassVar[bool] = False
    names_answers: ClassVar[bool] = False

    @property
    def judges_outcome(self) -> bool:
        """Whether it says if the answer is right; the others only shape the reward."""
        return True

    def idle_keys(self) -> Iterator[tuple[str, str]]:
        """Keys of this section that nothing reads, written or not, and why."""
        yield from ()

    @property
    def seconds(self) -> float | None:
        """Longest time that it takes for one completion by a clock of its own; None: it has none."""
        return None

    @property
    def unboxed(self) -> bool:
        """Whether it runs what the model writes with this user's files and network."""
        return False

    @property
    def sends_to(self) -> tuple[str, str | None] | None:
        """Address that problems and completions go to, and the environment variable with the key that goes along."""
        return None

    @property
    def limited(self) -> bool:
        """Whether it ends a run at a limit that each process counts by itself."""
        return False

    # ------------------------------------------------------------------------------- answers to audit it with (`gold`)

    def gold(self, problem: Problem) -> str | None:
        """The reference of a problem as a completion that it should call right; None: nothing says how."""
        return None

    def excludes(self, one: Problem, other: Problem) -> bool:
        """Whether the gold answer of `other` must be wrong for `one`; False where many answers may be right."""
        return False

    def spoilt(self, problem: Problem, completion: str) -> list[tuple[str, str]]:
        """Answers made wrong on purpose: what was done, and the completion."""
        return []


AnyVerifier = Annotated[SerializeAsAny[VerifierConfig], WrapValidator(by_type(VERIFIERS))]
"""A section of any verifier, by its `type`; those of plugins too."""
