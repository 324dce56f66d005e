"""Rows in the data formats of TRL, OpenAI, ShareGPT and Alpaca, recognised by their columns.

| format | columns | becomes |
| --- | --- | --- |
| prompt-only | prompt | `Problem` |
| prompt-completion | prompt, completion | `Example` |
| messages | messages | `Example`: the completion begins with the first assistant turn |
| sharegpt | conversations | the same |
| alpaca | instruction, output | `Example`: an `input` that is not empty follows the instruction after a blank line |
| preference | prompt, chosen, rejected | `Preference` |
| preference, implicit prompt | chosen, rejected | `Preference` |
| unpaired preference | prompt, completion, label | `Unpaired` |
| unpaired, other forms | those of messages, sharegpt or alpaca, label | `Unpaired`: the last assistant turn |
| stepwise supervision | prompt, completions, labels | `Stepwise` |

Each may be standard (text) or conversational (chat messages); stepwise and alpaca are text only. Columns of other names
go into `Problem.meta`. If the columns fit no format or fit several, say which format is meant.

A `system` column that holds text is the system message of a row that has none. What follows the last
assistant turn of a conversation is left out: no token of it could be trained on.

An implicit prompt is the longest common beginning of chosen and rejected. For messages that is whole turns, up to one
of the assistant. For text it is moved back to the start of a word, and the space before that word goes to the
completions: tokenizers keep a space with the word behind it, and a torn word would give tokens that no model writes.
TRL moves the space and tears the word; where the difference starts with a word, both agree.

A text prompt beside conversational completions is a copy of the first user message in some data sets. It is then left
aside and the prompt is taken from the messages, as in TRL.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from itertools import takewhile
from typing import Any

from posttrain.data import columns
from posttrain.data.messages import messages, written_as_text
from posttrain.data.sample import Message, Row
from posttrain.errors import DataError

Text = str | tuple[Message, ...]


class Format(StrEnum):
    """The data formats."""

    PROMPT_ONLY = "prompt-only"
    PROMPT_COMPLETION = "prompt-completion"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PREFERENCE = "preference"
    PREFERENCE_IMPLICIT = "preference-implicit"
    UNPAIRED = "unpaired-preference"
    STEPWISE = "stepwise"


COLUMNS: dict[Format, frozenset[str]] = {
    Format.PROMPT_ONLY: frozenset({"prompt"}),
    Format.PROMPT_COMPLETION: frozenset({"prompt", "completion"}),
    Format.MESSAGES: frozenset({"messages"}),
    Format.SHAREGPT: frozenset({"conversations"}),
    Format.ALPACA: frozenset({"instruction", "output"}),
    Format.PREFERENCE: frozenset({"prompt", "chosen", "rejected"}),
    Format.PREFERENCE_IMPLICIT: frozenset({"chosen", "rejected"}),
    Format.UNPAIRED: frozenset({"prompt", "completion", "label"}),
    Format.STEPWISE: frozenset({"prompt", "completions", "labels"}),
}
"""The columns that make up each format."""

_WITH_COMPLETIONS = (Format.MESSAGES, Format.SHAREGPT, Format.PROMPT_COMPLETION, Format.ALPACA)

KINDS: dict[str, tuple[frozenset[str], ...]] = {
    "preferences": (COLUMNS[Format.PREFERENCE_IMPLICIT],),
    "stepwise": (COLUMNS[Format.STEPWISE],),
    "unpaired": tuple(COLUMNS[name] | {"label"} for name in _WITH_COMPLETIONS),
    "completions": tuple(COLUMNS[name] for name in _WITH_COMPLETIONS),
    "prompts": (COLUMNS[Format.PROMPT_ONLY],),
}
"""The columns that rows of each section of `data` have, by their usual names; the first that fits is meant."""


def detect_completions(present: Collection[str], where: str = "") -> Format:
    """The format of rows with written completions, by their columns.

    Raises:
        DataError: none fits, or several do; names the key of a recipe that says which.
    """
    found = [name for name in _WITH_COMPLETIONS if COLUMNS[name] <= set(present)]
    if len(found) == 1:
        return found[0]
    columns_found = ", ".join(map(str, present)) or "(none)"
    if found:
        keys = {Format.PROMPT_COMPLETION: "completion: completion", Format.ALPACA: "completion: output"}
        choices = [keys.get(name, f"messages: {min(COLUMNS[name])}") for name in found]
        raise DataError(
            f"the columns {columns_found} hold completions in several forms: {', '.join(found)}",
            where=where,
            hint="say which: " + ", or ".join(f"`{choice}`" for choice in choices),
        )
    raise DataError(
        f"nothing says which column holds the completions; columns: {columns_found}",
        where=where,
        hint="for example `completion: answer`, or `messages: dialogue` for whole conversations; recognised by "
        "themselves: " + "; ".join(f"{' and '.join(sorted(COLUMNS[name]))} ({name})" for name in _WITH_COMPLETIONS),
    )


def kind_of(present: Collection[str], where: str = "") -> str:
    """The section of `data` that rows with these columns belong to: the one that says most about them.

    Raises:
        DataError: they belong to none.
    """
    found = set(present)
    for kind, needed in KINDS.items():
        if any(columns <= found for columns in needed):
            return kind
    formats = "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, needed in COLUMNS.items())
    raise DataError(
        f"the columns {', '.join(map(str, present)) or '(none)'} fit no data format",
        where=where,
        hint=f"known: {formats}",
    )


def split_implicit_prompt(chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected out of two completions that repeat the prompt; see the rule at the top.

    Raises:
        DataError: of different kinds, the same, or without a common beginning.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("one of chosen and rejected is text, the other messages", where=where)
    if chosen == rejected:
        raise DataError("chosen and rejected are the same", where=where)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str):
        assert isinstance(rejected, str)  # as above
        shared = _word_start(chosen, rejected, shared)
    else:
        assert not isinstance(rejected, str)
        # The last turn of the shorter one is a completion even if the longer one goes on from there.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        # Where they part at a turn of the user, the assistant's turn before it belongs to both completions.
        while shared and "assistant" not in {chosen[shared]["role"], rejected[shared]["role"]}:
            shared -= 1
    if not shared or (isinstance(chosen, str) and not chosen[:shared].strip()):
        raise DataError("chosen and rejected have no common beginning to take as the prompt", where=where)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _word_start(chosen: str, rejected: str, shared: int) -> int:
    shortest = min(len(chosen), len(rejected))
    if shared == shortest:
        # One text continues the other: the completions are the shorter one's last word and what follows it.
        shared = len((chosen if len(chosen) == shortest else rejected).rstrip())
    # Back to the start of the word in which the texts part, unless they part at its start.
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    return shared - 1 if shared and chosen[shared - 1] == " " else shared


def conversation(row: Row, column: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and completion of a whole conversation: what stands before the first assistant turn, and the rest.

    Raises:
        DataError: no list of messages, no assistant turn, none before it, or an empty one.
    """
    where = columns.at(row, column)
    raw = written_as_text(columns.value(row, column), where)
    if not isinstance(raw, list | tuple):
        raise DataError(f"must be a list of messages, not {type(raw).__name__}", where=where)
    turns = messages(raw, where)
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not spoken:
        raise DataError("there is no assistant message to train on", where=where)
    prompt = with_system(row, turns[: spoken[0]])
    if not any(turn["role"] not in ("system", "developer") for turn in prompt):
        raise DataError("the conversation begins with the assistant, so there is no prompt", where=where)
    completion = columns.check_completion_messages(turns[spoken[0] : spoken[-1] + 1], where)
    return columns.check_prompt_messages(prompt, where), completion


def instruction(row: Row) -> tuple[Text, str]:
    """Prompt and completion of an Alpaca row; with a `system` or a `history` of earlier turns the prompt is a chat.

    Raises:
        DataError: a missing or empty column.
    """
    prompt = columns.text(columns.value(row, "instruction"), columns.at(row, "instruction"))
    further = row.values.get("input")
    if further is not None and not (isinstance(further, str) and not further.strip()):
        prompt += "\n\n" + columns.text(further, columns.at(row, "input"))
    completion = columns.text(columns.value(row, "output"), columns.at(row, "output"))
    earlier = _history(row)
    turns = with_system(row, (*earlier, {"role": "user", "content": prompt}))
    return (turns if len(turns) > 1 else prompt), completion


def _history(row: Row) -> tuple[Message, ...]:
    raw, where = row.values.get("history") or [], columns.at(row, "history")
    if not isinstance(raw, list | tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in raw):
        raise DataError("a history is a list of pairs of question and answer", where=where)
    texts = [columns.text(text, where) for pair in raw for text in pair]
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))


def with_system(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns with what a `system` column says as the system message, where they have none."""
    said = row.values.get("system")
    if not isinstance(said, str) or not said.strip() or (turns and turns[0]["role"] in ("system", "developer")):
        return turns
    return ({"role": "system", "content": columns.text(said, columns.at(row, "system"))}, *turns)


def whole_response(row: Row, column: str) -> Text:
    """A response that may hold the prompt too: text, one message, or messages from whatever turn on."""
    where = columns.at(row, column)
    raw = written_as_text(columns.value(row, column), where)
    raw = [raw] if isinstance(raw, Mapping) else raw
    return messages(raw, where) if isinstance(raw, list | tuple) else columns.text(raw, where)


def labelled_steps(row: Row, column: str, label: str) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Steps and their labels.

    Raises:
        DataError: a column is no list or empty, or they differ in length.
    """
    steps, labels = (columns.listed(columns.value(row, name)) for name in (column, label))
    for name, found in ((column, steps), (label, labels)):
        if not isinstance(found, list | tuple) or not found:
            raise DataError("must be a list that is not empty", where=columns.at(row, name))
    if len(steps) != len(labels):
        raise DataError(f"{len(steps)} completions, but {len(labels)} labels", where=row.where)
    where_step, where_label = columns.at(row, column), columns.at(row, label)
    return (
        tuple(columns.text(step, f"{where_step}, item {index}") for index, step in enumerate(steps)),
        tuple(label_of(each, f"{where_label}, item {index}") for index, each in enumerate(labels)),
    )


def check_labels(rows: Sequence[Row], column: str) -> None:
    """Refuse labels of another scale: beside -1, 2 or `bad`, nobody knows what a 1 means. Null is for each row to say.

    Raises:
        DataError: a label, or one of a list of them, is neither true nor false; with the number of such rows.
    """
    first: tuple[Row, DataError] | None = None
    count = 0
    for row in rows:
        raw = columns.listed(row.values.get(column))
        for label in raw if isinstance(raw, list | tuple) else [raw]:
            if label is None or label != label:  # NaN is what tables hold for null
                continue
            try:
                label_of(label, columns.at(row, column))
            except DataError as error:
                first, count = first or (row, error), count + 1
                break
    if first is not None:
        raise DataError(
            f"{first[1].what} (so in {count:,} of {len(rows):,} rows)",
            where=first[1].where,
            hint="write true for good and false for bad; rows whose column says something else belong to "
            "data.completions",
        )


def is_grade(raw: Any) -> bool:
    """Whether a value of a `label` column says how good a completion is: true, false or a number."""
    if isinstance(raw, str) and raw.strip().lower() in ("true", "false"):
        return True
    try:
        return isinstance(raw, str | int | float) and math.isfinite(float(raw))
    except ValueError:
        return False


def label_of(raw: Any, where: str) -> bool:
    """A label; some data sets write 0 and 1, or the words as text.

    Raises:
        DataError: anything else.
    """
    if isinstance(raw, str) and raw.strip().lower() in ("true", "false", "0", "1"):  # as CSV files hold them
        return raw.strip().lower() in ("true", "1")
    if isinstance(raw, bool | int | float) and raw in (0, 1):
        return bool(raw)
    raise DataError(f"a label must be true or false, not {raw!r}", where=where)
