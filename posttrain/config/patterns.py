"""Regular expressions in recipes: a bad one is an error of its key, with the place where it goes wrong.

One that takes exponential time on some text would hang whoever reads the data. Those that run outside of a verifier's
killable workers are matched by `regex`, which takes Python's syntax and a clock.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated

import regex
from pydantic import AfterValidator

from posttrain.errors import RecipeError

SECONDS = 5.0
"""For one pattern on one text."""


MOST_REPEATS = 1_000_000
"""Repetitions within repetitions that a pattern may ask for: both libraries lay some of them out in memory."""

_REPEATS = re.compile(r"\{(\d+)")


def compiled(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """A pattern, which `find` takes too.

    Raises:
        ValueError: it is no regular expression, is nested too deeply, or asks for too many repetitions.
    """
    if math.prod(int(count[:8]) or 1 for count in _REPEATS.findall(pattern)) > MOST_REPEATS:
        raise ValueError(f"not a regular expression: it asks for more than {MOST_REPEATS:,} repetitions")
    try:
        regex.compile(pattern)
        return re.compile(pattern, flags)
    except (re.error, regex.error, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    except RecursionError as error:
        raise ValueError("not a regular expression: nested too deeply") from error


def _compiles(pattern: str) -> str:
    compiled(pattern)
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression, as text."""


def find(pattern: str, text: str, *, where: str, multiline: bool = False) -> Iterator[regex.Match[str]]:
    """The matches of a pattern in a text, from left to right.

    Args:
        pattern: that compiles.
        text: to search.
        where: the pattern's key, for the message.
        multiline: `^` and `$` also stand for the ends of lines.

    Raises:
        RecipeError: it takes more than `SECONDS`.
    """
    flags = regex.MULTILINE if multiline else 0
    try:
        yield from regex.compile(pattern, flags).finditer(text, timeout=SECONDS)
    except TimeoutError as error:
        raise RecipeError(
            f"the pattern {pattern!r} takes more than {SECONDS:g} s on a text of {len(text):,} characters",
            where=where,
            hint="a repetition within a repetition, as in (a+)+, takes exponential time; write it without",
        ) from error
