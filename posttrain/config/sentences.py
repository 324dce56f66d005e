"""Levels that the sentences of an answer are asked for, one after another."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from posttrain.config.section import Section
from posttrain.data.controllers import TEMPLATE, ControllerTemplate, Level


class SentenceControl(Section):
    """Controllers before each sentence of an answer, by a policy that was trained with method `ldc`."""

    levels: list[Annotated[dict[str, Level], Field(min_length=1)]] = Field(
        min_length=1,
        description="quality -> level in [0, 1], for each sentence; by the last entry the answer is written to its end",
    )
    end: str = Field(". ", min_length=1, description="text that ends a sentence")
    template: ControllerTemplate = Field(TEMPLATE, description="how a controller is written, as in the method")
