"""User-written patterns that say where in a completion the answer stands."""

from __future__ import annotations

import re

from posttrain.config.patterns import compiled
from posttrain.errors import RecipeError


def compile_pattern(pattern: str, *, where: str, flags: re.RegexFlag = re.NOFLAG, groups: int = 1) -> re.Pattern[str]:
    """Compile a pattern of a recipe.

    Args:
        pattern: a regular expression.
        where: its key, for error messages.
        flags: as for `re.compile`.
        groups: fewest groups it must have.

    Raises:
        RecipeError: it is no regular expression, or has too few groups.
    """
    try:
        found = compiled(pattern, flags)
    except ValueError as error:
        raise RecipeError(f"{pattern!r} is {error}", where=where) from error
    if found.groups < groups:
        raise RecipeError(
            f"{pattern!r} has no group", where=where, hint="put round brackets around the answer, as in 'Answer: (.*)'"
        )
    return found


def last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group of the last match, stripped; None without a match or where the group took no part in it."""
    last = None
    for found in pattern.finditer(text):
        last = found
    return None if last is None or last[1] is None else last[1].strip()
