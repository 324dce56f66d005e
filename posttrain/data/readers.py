"""Readers of plugins: files of kinds that are not built in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.effects import LOCAL_SUFFIXES
from posttrain.config.own_code import in_short
from posttrain.data.sample import Row
from posttrain.errors import DataError, PluginError

Reader = Callable[[Path], Iterable[Mapping[str, Any]]]
"""Takes a file and gives its rows, one at a time where the file may be large."""

READERS: dict[str, Reader] = {}
"""By the ending of the files, `.sqlite`."""


def register(ending: str) -> Callable[[Reader], Reader]:
    """Make files of this ending data; to be used as a decorator, `@register(".sqlite")`, on a function that reads one.

    Wherever a recipe or a command takes a data file it takes these too. What a file is to a run, is its bytes.

    Raises:
        PluginError: it is no ending, or one that can be read already.
    """
    if not ending.startswith(".") or ending != ending.lower() or "/" in ending:
        raise PluginError(f"{ending!r} is no ending of files", hint="like `.sqlite`, in small letters")
    if ending in LOCAL_SUFFIXES:
        raise PluginError(f"files that end in {ending} can be read already", hint="give yours another ending")

    def known(reader: Reader) -> Reader:
        READERS[ending] = reader
        LOCAL_SUFFIXES.append(ending)
        return reader

    return known


def own_rows(file: Path, ending: str) -> Iterator[Row]:
    """The rows of a file by the reader of a plugin.

    Raises:
        DataError: the reader raises, or gives something else than rows.
    """
    index = 0
    try:
        for values in READERS[ending](file):
            if not isinstance(values, Mapping):
                what = f"the reader of {ending} gave a {type(values).__name__}, not an object with columns"
                raise DataError(what, where=f"{file} row {index}")
            yield Row(dict(values), f"{file} row {index}")
            index += 1
    except DataError:
        raise
    # Whatever a user's reader raises is about this file, to be shown as such.
    except Exception as error:
        raise DataError(f"the reader of {ending} failed: {in_short(error)}", where=f"{file} row {index}") from error
