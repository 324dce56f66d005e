"""Typed values out of raw rows. Every check that a row must pass is here, and every error names row and column."""

from __future__ import annotations

import json
import math
from typing import Any

from posttrain.data.messages import encodable, messages, says_nothing, written_as_text
from posttrain.data.sample import Message, Row
from posttrain.errors import DataError, nearest


def at(row: Row, column: str) -> str:
    """The place of one value, for errors."""
    return f"{row.where}, column {column!r}"


def value(row: Row, column: str) -> Any:
    """The raw value.

    Raises:
        DataError: no such column, or null; names the columns there are.
    """
    if column not in row.values:
        raise missing_column(row, column)
    if row.values[column] is None:
        raise DataError("the value is null", where=at(row, column))
    return row.values[column]


def missing_column(row: Row, column: str) -> DataError:
    """The error for a column that a row does not have."""
    present = ", ".join(row.values) or "none"
    return DataError(
        f"no column {column!r}; columns: {present}", where=row.where, hint=nearest(column, map(str, row.values))
    )


def text(raw: Any, where: str) -> str:
    """`raw` as text that is not blank and can be encoded.

    Raises:
        DataError: another type, blank, or half of a surrogate pair (such text has no UTF-8 form and no tokens).
    """
    if not isinstance(raw, str):
        raise DataError(f"must be text, not {type(raw).__name__}", where=where)
    if not raw.strip():
        raise DataError("the text is empty", where=where)
    return encodable(raw, where)


def listed(raw: Any) -> Any:
    """The list that a text value holds as JSON (a cell of a CSV file, say); any other value as it is."""
    if not isinstance(raw, str):
        return raw
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return found if isinstance(found, list) else raw


def prompt(row: Row, column: str) -> str | tuple[Message, ...]:
    """Text, or chat messages the last of which is not from the system.

    Raises:
        DataError: missing, empty or of another type.
    """
    where = at(row, column)
    raw = written_as_text(value(row, column), where)
    if not isinstance(raw, list | tuple):
        return text(raw, where)
    return check_prompt_messages(messages(raw, where), where)


def check_prompt_messages(found: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """`found`, if it can stand before a completion."""
    if found[-1]["role"] in ("system", "developer"):
        raise DataError(f"the prompt ends with a {found[-1]['role']} message", where=where, hint="add a user message")
    if says_nothing(found[-1]):
        raise DataError("the last message of the prompt is empty", where=where)
    return found


def behind_prompt(prompt: str | tuple[Message, ...], found: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    """What follows the prompt in messages that repeat it, with or without its system message; else `found` as it is."""
    if isinstance(found, str):
        return found
    said = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    starts = (said, said[1:]) if said[0]["role"] in ("system", "developer") else (said,)
    return next(
        (found[len(start) :] for start in starts if found[: len(start)] == start and len(found) > len(start)), found
    )


def check_completion_messages(found: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """`found`, if it begins and ends with an assistant turn and no such turn is empty."""
    for index in (0, -1):
        if found[index]["role"] != "assistant":
            end = "first" if index == 0 else "last"
            raise DataError(
                f"the {end} message of a completion must be the assistant's, not the {found[index]['role']}'s",
                where=where,
                hint="earlier turns belong into the prompt" if index == 0 else "nothing after it could be trained on",
            )
    for index, message in enumerate(found):
        if message["role"] == "assistant" and says_nothing(message):
            raise DataError(f"assistant message {index} is empty", where=where)
    return found


def reference(row: Row, column: str) -> str:
    """A gold answer as text; whole numbers are written without decimals, also where a file holds them as floats.

    A list of texts is one answer in several parts, joined by commas.

    Raises:
        DataError: missing, empty, not finite, or neither text nor number.
    """
    raw, where = value(row, column), at(row, column)
    if isinstance(raw, bool):
        raise DataError("a reference must be text or a number, not bool", where=where)
    if isinstance(raw, float):
        if not math.isfinite(raw):
            raise DataError(f"the reference is {raw}", where=where)
        return str(int(raw)) if raw.is_integer() else repr(raw)
    if isinstance(raw, int):
        return str(raw)
    if isinstance(raw, list | tuple) and raw:
        return ", ".join(text(part, where) for part in raw)
    return text(raw, where)
