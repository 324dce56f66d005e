"""Principles that a reward model reads in its prompt, as a recipe gives them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from posttrain.config.section import Section

PLACEHOLDER = re.compile(r"\{(prompt|principles)\}")


class Principle(Section):
    """What is asked of a response, and its contrary."""

    text: str = Field(min_length=1, description="what a response should be")
    negative: str = Field(min_length=1, description="the contrary, which stands there where the principle is negated")


def _both_placeholders(template: str) -> str:
    missing = {"{prompt}", "{principles}"} - {match.group() for match in PLACEHOLDER.finditer(template)}
    if missing:
        raise ValueError(f"the template has no {' and no '.join(sorted(missing))}")
    return template


PrincipleTemplate = Annotated[str, AfterValidator(_both_placeholders)]
"""A text with `{prompt}` and `{principles}`; other braces stand for themselves."""

TEMPLATE = "{prompt}\n\nJudge the response by these principles:\n{principles}"
