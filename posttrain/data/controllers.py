"""Controllers: the levels that an answer is asked for, written before it or before one of its sentences.

They are text, so that the policy reads them, whoever judges an answer can tell what was asked for, and no tokenizer has
to know them. LDC, arXiv 2412.14626; how its authors write them is not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated

from pydantic import AfterValidator, Field

TEMPLATE = "{name}={level};"

Level = Annotated[float, Field(ge=0, le=1)]


def _with_a_level(template: str) -> str:
    if template.count("{level}") != 1 or template.count("{name}") > 1:
        raise ValueError("expected one {level} and at most one {name}")
    if template.endswith("{level}"):
        raise ValueError("something must stand behind {level}, so that it can be told from the answer")
    return template


ControllerTemplate = Annotated[str, AfterValidator(_with_a_level)]
"""How one controller is written; all of them follow one another."""


def controllers(levels: Mapping[str, float], template: str) -> str:
    """The text of levels in [0, 1], in their order."""

    def written(level: float) -> str:
        return f"{level:.6f}".rstrip("0").rstrip(".")

    return "".join(template.replace("{name}", name).replace("{level}", written(it)) for name, it in levels.items())


def read_controllers(text: str, names: Sequence[str], template: str) -> tuple[dict[str, float], str] | None:
    """The levels at the beginning of an answer, and what stands behind them; None where they are not there.

    Controllers within the answer, of later sentences, are taken out of it.
    """
    pattern = _pattern(tuple(names), template)
    found = pattern.match(text)
    if found is None:
        return None
    return dict(zip(names, map(float, found.groups()), strict=True)), pattern.sub("", text)


def read_sentences(text: str, names: Sequence[str], template: str) -> list[tuple[dict[str, float], str]]:
    """The levels before each part of an answer, and that part; none where it does not begin with controllers."""
    found = list(_pattern(tuple(names), template).finditer(text))
    if not found or found[0].start() > 0:
        return []
    ends = [each.start() for each in found[1:]] + [len(text)]
    return [
        (dict(zip(names, map(float, each.groups()), strict=True)), text[each.end() : end])
        for each, end in zip(found, ends, strict=True)
    ]


@cache
def _pattern(names: tuple[str, ...], template: str) -> re.Pattern[str]:
    def one(name: str) -> str:
        parts = re.split(r"(\{name\}|\{level\})", template)
        known = {"{name}": re.escape(name), "{level}": r"([01](?:\.[0-9]{1,6})?)"}
        return "".join(known.get(part, re.escape(part)) for part in parts)

    return re.compile("".join(map(one, names)))
