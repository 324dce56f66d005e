"""What the sections of all things that a recipe names by `type` have in common: verifiers and environments.

Each has its own section beside its class: `Config`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticKnownError

from posttrain.config.own_code import OwnCode
from posttrain.config.section import Section
from posttrain.registry import Registry


class RegisteredSection(Section):
    """Base of these sections. Subclasses set `type` to a Literal.

    Class attributes:
        table: that `type` names an entry of.
    """

    type: str

    table: ClassVar[Registry[Any]]

    def model_post_init(self, context: Any, /) -> None:
        self.__pydantic_fields_set__.add("type")  # so that no dump of what was written leaves it out

    @property
    def codes(self) -> list[OwnCode]:
        """Code of the user's own that it runs."""
        return []

    @property
    def runs(self) -> list[str]:
        """The same in words, and what else it runs that is not ours."""
        return [f"{code} (sha256 {code.digest()[:12]})" for code in self.codes]

    def inputs(self) -> list[str]:
        """Paths and Hub ids that it reads."""
        return [str(code.file) for code in self.codes if code.file is not None]


def sections_of(base: Any) -> list[type[RegisteredSection]]:
    """The sections of all entries of the table that a base class is for; none for any other type."""
    table = vars(base).get("table") if isinstance(base, type) else None
    return [entry.Config for entry in table.values()] if isinstance(table, Registry) else []


def by_type(table: Registry[Any]) -> Callable[[Any, Any, ValidationInfo], Any]:
    """What validates a section by the entry of a table that its `type` names; those of plugins too."""

    def validate(value: Any, _: Any, info: ValidationInfo) -> Any:
        if isinstance(value, RegisteredSection):
            return value
        if not isinstance(value, dict):
            raise PydanticKnownError("model_type", {"class_name": table.kind})
        if "type" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'type'"})
        kind = value["type"]
        if not isinstance(kind, str) or kind not in table:
            tags = {"discriminator": "'type'", "tag": str(kind), "expected_tags": ", ".join(table)}
            raise PydanticKnownError("union_tag_invalid", tags)
        section = table[kind].Config
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
            raise ValidationError.from_exception_data(table.kind, lines) from error

    return validate
