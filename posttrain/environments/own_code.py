"""Runs code of the user's own that an environment is made of; what it raises is shown as a mistake in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.config.own_code import find, in_short, load
from posttrain.errors import WorldError


def own(written: str, use: Callable[[Any], Any] = lambda found: found) -> Any:
    """What is made of the code that is named so; by default what the name stands for.

    Raises:
        WorldError: the code raises something.
    """
    code = find(written)
    return guarded(written, lambda: use(getattr(load(code.place), code.name)))


def guarded(where: str, run: Callable[[], Any]) -> Any:
    """What this gives.

    Raises:
        WorldError: it raises something; names `where`.
    """
    try:
        return run()
    # Whatever the user's code raises while it is loaded is a mistake in it, to be shown as such.
    except Exception as error:
        raise WorldError(in_short(error), where=where) from error
