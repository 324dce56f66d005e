"""What every verifier's section says. Each verifier has its own beside its class: `Config`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, WrapValidator
from pydantic_core import InitErrorDetails, PydanticKnownError

from posttrain.config.own_code import OwnCode
from posttrain.config.section import Section
from posttrain.data.sample import Problem
from posttrain.verifiers import VERIFIERS


class VerifierConfig(Section):
    """Base of all verifier sections. Subclasses set `type` to a Literal, and say here what others must know of them.

    Class attributes:
        needs_reference: it compares with a gold answer, so every problem must have one.
        names_answers: its verdicts have an `answer`, so that answers can vote (maj@k).
    """

    weight: float = Field(1.0, description="factor of the score in the reward")
    gate: bool = Field(False, description="the reward is 0 unless this verifier says correct")
    type: str

    needs_reference: ClassVar[bool] = False
    names_answers: ClassVar[bool] = False

    def model_post_init(self, context: Any, /) -> None:
        self.__pydantic_fields_set__.add("type")  # so that no dump of what was written leaves it out

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
    def code(self) -> OwnCode | None:
        """Code of the user's own that it runs."""
        return None

    def inputs(self) -> list[str]:
        """Paths and Hub ids that it reads."""
        return [] if self.code is None or self.code.file is None else [str(self.code.file)]

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


def verifier_sections() -> list[type[VerifierConfig]]:
    """The sections of all verifiers there are."""
    return [verifier.Config for verifier in VERIFIERS.values()]


def _of_its_type(value: Any, _: Any, info: ValidationInfo) -> Any:
    """Validate a section by the verifier that its `type` names."""
    if isinstance(value, VerifierConfig):
        return value
    if not isinstance(value, dict):
        raise PydanticKnownError("model_type", {"class_name": "VerifierConfig"})
    if "type" not in value:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'type'"})
    kind = value["type"]
    if not isinstance(kind, str) or kind not in VERIFIERS:
        tags = {"discriminator": "'type'", "tag": str(kind), "expected_tags": ", ".join(VERIFIERS)}
        raise PydanticKnownError("union_tag_invalid", tags)
    section = VERIFIERS[kind].Config
    try:
        if info.mode == "json":  # in which a list may stand for a tuple
            return section.model_validate_json(json.dumps(value), strict=True, context=info.context)
        return section.model_validate(value, context=info.context)
    except ValidationError as error:
        # The path gets the type, as pydantic's own unions write it.
        lines: list[InitErrorDetails] = [
            {"type": e["type"], "loc": (kind, *e["loc"]), "input": e["input"], "ctx": e.get("ctx", {})}
            for e in error.errors(include_url=False)
        ]
        raise ValidationError.from_exception_data("verifier", lines) from error


AnyVerifier = Annotated[SerializeAsAny[VerifierConfig], WrapValidator(_of_its_type)]
"""A section of any verifier, by its `type`; those of plugins too."""
