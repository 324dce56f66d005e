"""Rows of preference data as prompt and responses, whichever way a file writes them.

- Explicit prompt: there is a prompt column, and the responses are what follows it: text, or messages that begin with an
  assistant turn. A prompt that is a dialogue (see below) in which the assistant is to speak next becomes messages.
- Implicit prompt: there is no prompt column. The prompt is the longest common beginning of the responses, by the rule
  of `data.formats`. The same holds where a text prompt stands beside whole conversations, whose first turn
  repeats it.
- Conversation: there is no prompt column, but one of a conversation (`conversations`, `messages`), and the responses
  are messages that begin with an assistant turn, often a single one. The conversation is the prompt.
- Repeated prompt: there is a prompt column, and all responses are text that begins with it, as those of nearly every
  row of the file do (`data.repeated_prompts`). What follows it is the response.
- Dialogue: implicit, in the form of HH-RLHF, `\\n\\nHuman: ...\\n\\nAssistant: ...`. It becomes chat messages, or with
  `chat: false` a text prompt that ends in `Assistant:`. A marker that does not change the speaker is a part of what was
  said; a policy that ran on wrote it. The prompt ends with the last turn of the human that all responses share.

Rows whose chosen and rejected are the same, or where one of them is an empty reply in a dialogue, say nothing about a
policy. They are read like the others, and `usable` counts them when it leaves them out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from posttrain.config.schema import FileSource
from posttrain.data import columns
from posttrain.data.formats import split_implicit_prompt, whole_response
from posttrain.data.messages import says_nothing, written_as_text
from posttrain.data.sample import Message, Preference, Row, Stepwise, Unpaired
from posttrain.errors import DataError, RecipeError, nearest

Text = str | tuple[Message, ...]

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """One row.

    Attributes:
        prompt: None where it is to be read from the prompt column.
        responses: what follows the prompt, by role; `chosen` and `rejected` first.
        scores: by role, for those roles that have one.
        used: columns that were read.
        repeated: the responses repeated the prompt, which was cut off them.
    """

    prompt: Text | None
    responses: dict[str, Text]
    scores: dict[str, float]
    used: set[str]
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Unusable:
    """Rows that say nothing.

    Attributes:
        identical: chosen and rejected are the same.
        empty: a response of a dialogue is an empty reply.
    """

    identical: int
    empty: int


R = TypeVar("R", Preference, Unpaired, Stepwise)


def usable(rows: Sequence[R]) -> tuple[list[R], Unusable]:
    """The rows that can be trained on, in their order, and how many others there were."""
    identical = [isinstance(row, Preference) and row.chosen == row.rejected for row in rows]
    empty = [any(map(_is_empty, _completions(row))) for row in rows]
    kept = [row for row, same, blank in zip(rows, identical, empty, strict=True) if not same and not blank]
    return kept, Unusable(sum(identical), len(rows) - len(kept) - sum(identical))


def _completions(row: Preference | Unpaired | Stepwise) -> tuple[Text, ...]:
    if isinstance(row, Stepwise):
        return row.steps
    return (row.completion,) if isinstance(row, Unpaired) else (row.chosen, row.rejected, *row.others.values())


def check_roles(source: FileSource, name: str) -> None:
    """Refuse role names that cannot be meant.

    Raises:
        RecipeError: `others` names a role that has its own key, or `scores` one that has no response.
    """
    for role in {"chosen", "rejected"} & set(source.others or {}):
        raise RecipeError(f"{role!r} has a key of its own", where=f"{name}.others", hint=f"write `{role}: <column>`")
    roles = {"chosen", "rejected", *(source.others or {})}
    for role in set(source.scores or {}) - roles:
        raise RecipeError(f"no response has the role {role!r}", where=f"{name}.scores", hint=nearest(role, roles))


def parse_row(row: Row, source: FileSource, *, repeats: bool = False) -> Parsed:
    """A row of preference data.

    Args:
        repeats: its responses are text that repeats the prompt: what follows the prompt is the response.

    Raises:
        DataError: a missing column, an empty response, responses of different kinds, or no common beginning.
    """
    roles = {"chosen": source.chosen or "chosen", "rejected": source.rejected or "rejected", **(source.others or {})}
    whole = {role: whole_response(row, column) for role, column in roles.items()}
    if len({isinstance(response, str) for response in whole.values()}) > 1:
        raise DataError("some of the responses are text and some are messages", where=row.where)
    scores, score_columns = _scores(row, source, list(roles))
    used = {*roles.values(), *score_columns}
    if _has_prompt_column(row, source) and not _repeats_prompt(row, source, whole):
        if source.template is None and not isinstance(whole["chosen"], str):
            prompt = columns.prompt(row, source.prompt)
            whole = {role: columns.behind_prompt(prompt, response) for role, response in whole.items()}
        responses = {role: _checked(row, roles[role], response) for role, response in whole.items()}
        said = row.values.get(source.prompt)
        if repeats:
            responses = {role: str(response).removeprefix(str(said)) for role, response in responses.items()}
        elif _is_begun_dialogue(said) and source.template is None and source.chat is not False:
            turns = [(role, said[start:end]) for role, start, end in dialogue_turns(said)]
            replies = {role: reply.strip() if isinstance(reply, str) else reply for role, reply in responses.items()}
            return Parsed(_messages(turns[:-1]), replies, scores, used | {source.prompt})
        return Parsed(None, responses, scores, used, repeats)
    if source.template is not None:
        raise DataError("`template` needs a prompt column, and the prompt of this row is implicit", where=row.where)
    if (column := _conversation_column(row, whole)) is not None:
        prompt = columns.prompt(row, column)
        assert not isinstance(prompt, str)  # as above
        if prompt[-1]["role"] == "assistant":
            raise DataError(
                "the conversation ends with the assistant, so no response can follow", where=columns.at(row, column)
            )
        responses = {role: _checked(row, roles[role], response) for role, response in whole.items()}
        return Parsed(prompt, responses, scores, used | {column})
    try:
        prompt, responses = _split(row, whole, plain=source.chat is False)
    except DataError as error:
        raise DataError(error.what, where=error.where, hint=error.hint or _prompt_hint(row, used)) from error
    if not isinstance(prompt, str):
        columns.check_prompt_messages(prompt, row.where)
    used |= {source.prompt} if source.prompt in row.values else set()
    return Parsed(prompt, responses, scores, used)


def is_dialogue(text: str) -> bool:
    """Whether a text is a dialogue in the form of HH-RLHF."""
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


# ------------------------------------------------------------------------------------------------------------ columns


def _has_prompt_column(row: Row, source: FileSource) -> bool:
    return source.template is not None or "prompt" in source.model_fields_set or source.prompt in row.values


def _conversation_column(row: Row, whole: dict[str, Text]) -> str | None:
    """The column with the conversation that all responses go on from, if it is a list of messages."""
    if any(isinstance(response, str) or response[0]["role"] != "assistant" for response in whole.values()):
        return None
    listed = (
        column
        for column in ("conversations", "messages")
        if isinstance(written_as_text(row.values.get(column), columns.at(row, column)), list | tuple)
    )
    return next(listed, None)


def _prompt_hint(row: Row, used: set[str]) -> str:
    """Which other column of text may be the prompt."""
    texts = [
        name for name, value in row.values.items() if name not in used and isinstance(value, str) and value.strip()
    ]
    if not texts:
        return ""
    named = next((name for name in ("instruction", "question", "query", "input") if name in texts), texts[0])
    several = ", or a `template` of several" if len(texts) > 1 else ""
    return f"columns: {', '.join(row.values)}; say which holds the prompt, `prompt: {named}`{several}"


def _repeats_prompt(row: Row, source: FileSource, whole: dict[str, Text]) -> bool:
    """Whether the responses are conversations from their start, beside a text prompt that repeats their first turns."""
    if not isinstance(row.values.get(source.prompt), str):
        return False
    if isinstance(whole["chosen"], str):
        return source.template is None and all(is_dialogue(str(response)) for response in whole.values())
    return whole["chosen"][0]["role"] != "assistant"


def _is_begun_dialogue(text: Any) -> bool:
    """Whether a prompt is a dialogue in which the assistant is to speak next."""
    return isinstance(text, str) and is_dialogue(text) and text.rstrip().endswith("\n\nAssistant:")


def _checked(row: Row, column: str, response: Text) -> Text:
    return (
        response if isinstance(response, str) else columns.check_completion_messages(response, columns.at(row, column))
    )


def _scores(row: Row, source: FileSource, roles: list[str]) -> tuple[dict[str, float], set[str]]:
    if source.scores is not None:
        named = source.scores
    else:
        named = {role: f"score_{role}" for role in roles if row.values.get(f"score_{role}") is not None}
    scores = {role: _number(columns.value(row, column), columns.at(row, column)) for role, column in named.items()}
    return scores, set(named.values())


def _number(raw: Any, where: str) -> float:
    # CSV files hold numbers as text.
    try:
        value = float(raw) if isinstance(raw, str | int | float) and not isinstance(raw, bool) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"a score must be a finite number, not {raw!r}", where=where)
    return value


# ---------------------------------------------------------------------------------------------------- implicit prompts


def _split(row: Row, whole: dict[str, Text], *, plain: bool) -> tuple[Text, dict[str, Text]]:
    """The common prompt, and what each response adds to it."""
    if all(isinstance(response, str) and is_dialogue(response) for response in whole.values()):
        turns = {role: dialogue_turns(str(response)) for role, response in whole.items()}
        return _split_dialogues(row, whole, turns, plain=plain)
    if whole["chosen"] == whole["rejected"]:
        return _split_identical(whole)
    prompt, chosen, rejected = split_implicit_prompt(whole["chosen"], whole["rejected"], row.where)
    responses: dict[str, Text] = {"chosen": chosen, "rejected": rejected}
    for role in [role for role in whole if role not in responses]:
        if whole[role][: len(prompt)] != prompt:
            raise DataError(f"{role} does not begin with the prompt that chosen and rejected share", where=row.where)
        responses[role] = whole[role][len(prompt) :]
    for role, response in responses.items():
        if not isinstance(response, str):
            columns.check_completion_messages(response, f"{row.where}, {role}")
        elif not response.strip():
            raise DataError(f"{role} adds nothing to the common beginning", where=row.where)
    return prompt, responses


def _split_identical(whole: dict[str, Text]) -> tuple[Text, dict[str, Text]]:
    """Where nothing differs, nothing says where the prompt ends. Such a row is never trained on."""
    chosen = whole["chosen"]
    if isinstance(chosen, str) or len(chosen) < 2:
        return chosen, whole
    return chosen[:-1], {role: response[-1:] for role, response in whole.items()}


def dialogue_turns(text: str) -> list[tuple[str, int, int]]:
    """(role, start, end) of the turns of a dialogue; `text[start:end]` is what was said, with its outer white space."""
    turns: list[tuple[str, int, int]] = []
    for marker in _MARKER.finditer(text):
        role = _ROLES[marker[1]]
        if turns and turns[-1][0] == role:
            continue
        if turns:
            turns[-1] = (turns[-1][0], turns[-1][1], marker.start())
        turns.append((role, marker.end(), len(text)))
    return turns


def _split_dialogues(
    row: Row, texts: dict[str, Text], turns: dict[str, list[tuple[str, int, int]]], *, plain: bool
) -> tuple[Text, dict[str, Text]]:
    said = {
        role: [(speaker, str(texts[role])[start:end]) for speaker, start, end in found] for role, found in turns.items()
    }
    shortest = min(map(len, said.values()))
    first = next(iter(said.values()))
    shared = 0
    while shared < shortest - 1 and all(each[shared] == first[shared] for each in said.values()):
        shared += 1
    # Turns alternate from the human's on, and a response begins with the assistant's.
    shared -= 1 - shared % 2
    if shared < 1:
        raise DataError("the dialogues have no common beginning to take as the prompt", where=row.where)
    for role, each in said.items():
        if each[-1][0] != "assistant":
            raise DataError(f"the dialogue of {role} does not end with the assistant", where=row.where)
    if plain:
        # Up to the colon behind `Assistant`; the space behind it goes to the response, as tokenizers have it.
        ends = {role: found[shared][1] for role, found in turns.items()}
        prompt = str(texts["chosen"])[: ends["chosen"]]
        return prompt, {role: str(text)[ends[role] :].rstrip() for role, text in texts.items()}
    responses: dict[str, Text] = {role: _messages(each[shared:]) for role, each in said.items()}
    return _messages(first[:shared]), responses


def _messages(turns: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": text.strip()} for role, text in turns)


def _is_empty(response: Text) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return any(turn["role"] == "assistant" and says_nothing(turn) for turn in response)
