"""Chat messages out of raw rows, whichever way a data set writes them; one form comes out.

| a row has | it becomes |
| --- | --- |
| `{"role": ..., "content": ...}` | itself |
| `{"from": "human", "value": ...}` (ShareGPT) | role and content; `human` is the user, `gpt` the assistant |
| content as a list of text parts | their text, joined |
| null content beside tool calls | empty content |
| tool calls with arguments as JSON text (OpenAI) | arguments as an object, which chat templates expect |
| what a tool answered as an object or a number | its JSON text |
| `{"from": "function_call", "value": "{...}"}` | an assistant message with that tool call |
| a `function_call` on an assistant message (OpenAI's older form) | a tool call |
| a bare description of a function, `{"name": ..., "parameters": ...}` (of that form) | a tool of type `function` |
| reasoning in a key of its own (`REASONING`) | kept under that key, as text |
| `weight: 0` on an assistant message (OpenAI) | kept: context, without loss; 1, the default, is left out |
| `train: false`, or another flag of `TRAINED`, on one | the same |

Further keys are kept if they hold text (`name`, `tool_call_id`, `reasoning_content`): a template may read them. Null
values, empty lists, numbers and flags (`turn_identifier`, `redacted`) say nothing that a template could show and are
left out, and so are keys of a tool's description that are null. In the arguments of a tool call a null is kept, unless
a typed file (Arrow, Parquet) may have filled it in for a key that only other calls have: `without_filled` takes it out
of what such files give. Arguments written as JSON text keep theirs there too.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from posttrain.data.sample import Message
from posttrain.errors import DataError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Names of the same roles in data sets."""

FUNCTION_CALL = "function_call"
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
    "thought",
    "thoughts",
    "reasoning_text",
    "thinking_content",
    "chain_of_thought",
    "rationale",
)
"""Keys by which data sets and templates name the reasoning of a message."""

TRAINED = ("train", "training", "trainable", "loss")
"""Flags by which data sets of other tools say whether an assistant message is trained on."""

_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


def messages(raw: Sequence[Any], where: str) -> tuple[Message, ...]:
    """Chat messages with `role` and `content`; see the table at the top.

    Raises:
        DataError: an empty list, a message of another shape, an unknown role, or content that is not text.
    """
    if not raw:
        raise DataError("the list of messages is empty", where=where)
    return tuple(_message(message, f"{where}, message {index}") for index, message in enumerate(raw))


def written_as_text(raw: Any, where: str) -> Any:
    """The list of messages that a text value holds (a cell of a CSV file, say); any other value as it is.

    Raises:
        DataError: the text looks like a list of messages and cannot be read as one.
    """
    if not isinstance(raw, str) or _LIKE_MESSAGES.match(raw) is None:
        return raw
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(raw.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(
                "the text looks like chat messages and is neither JSON nor a Python list",
                where=where,
                hint='write them as JSON: [{"role": "user", "content": "..."}, ...]; text like this is not trained on',
            ) from error
    whole = all(
        isinstance(item, dict) and ({"role", "content"} <= set(item) or {"from", "value"} <= set(item))
        for item in found
    )
    return found if whole else raw


def tool_schemas(raw: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The descriptions of tools that a row offers, as objects; also written as JSON text. Empty for none.

    Raises:
        DataError: not a list of objects.
    """
    if isinstance(raw, str):
        raw = _json(raw, where, "the tools") if raw.strip() else []
    if raw is None or raw == []:
        return ()
    if not isinstance(raw, list | tuple) or not all(isinstance(tool, dict) for tool in raw):
        raise DataError("tools must be a list of objects that describe functions", where=where)
    return tuple(_tool(_without_null(tool)) for tool in raw)


def _tool(raw: dict[str, Any]) -> dict[str, Any]:
    described = isinstance(raw.get("parameters"), dict) or set(raw) <= {"type", "name", "description", "strict"}
    if "function" in raw or not isinstance(raw.get("name"), str) or not described:
        return raw
    return {"type": "function", "function": {key: item for key, item in raw.items() if key != "type"}}


def are_tool_schemas(raw: Any) -> bool:
    """Whether a value looks like what `tool_schemas` reads, for a column that nobody named."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            return False
    described = ("function", "parameters", "arguments", "inputSchema", "description")
    return (
        isinstance(raw, list | tuple)
        and bool(raw)
        and all(
            isinstance(tool, dict) and any(isinstance(tool.get(key), dict | str) for key in described) for tool in raw
        )
    )


def is_context(message: Message) -> bool:
    """Whether an assistant message is there to be read, not to be trained on."""
    return message.get("weight") == 0


def as_context(message: Message) -> Message:
    """The same message without loss."""
    return {**message, "weight": 0}


def says_nothing(message: Message) -> bool:
    """Whether a message has neither text nor tool calls."""
    return not message["content"].strip() and not message.get("tool_calls")


# ------------------------------------------------------------------------------------------------------- one message


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f"a message must be an object with role and content, not {type(raw).__name__}", where=where)
    if "role" not in raw and isinstance(raw.get("from"), str) and "value" in raw:
        raw = {"role": raw["from"], "content": raw["value"]} | {
            k: v for k, v in raw.items() if k not in ("from", "value")
        }
    if "role" not in raw or ("content" not in raw and not (raw.get("tool_calls") or _former_call(raw))):
        key = "role" if "role" not in raw else "content"
        keys = ", ".join(map(str, raw)) or "none"
        raise DataError(f"a message needs `{key}`; keys: {keys}", where=where, hint=nearest(key, map(str, raw)))
    role = raw["role"]
    if not isinstance(role, str):
        raise DataError(f"`role` must be text, not {type(role).__name__}", where=where)
    if role == FUNCTION_CALL:
        return {"role": "assistant", "content": "", "tool_calls": [_call_as_text(raw["content"], where)]}
    found: Message = {"role": OTHER_NAMES.get(role, role)}
    if found["role"] not in ROLES:
        raise DataError(f"unknown role {role!r}", where=where, hint=nearest(role, (*ROLES, *OTHER_NAMES)))
    calls = _tool_calls(raw.get("tool_calls") or _former_call(raw), where)
    content = raw.get("content")
    if found["role"] == "tool" and isinstance(content, dict | int | float):
        content = json.dumps(content, ensure_ascii=False)
    found["content"] = _content(content, where, may_be_null=bool(calls))
    for key, item in raw.items():
        if key in REASONING:
            found |= {key: said} if (said := _reasoning(item, where, key)) else {}
        elif key not in ("role", "content", "weight", "tool_calls") and isinstance(item, str):
            found[key] = encodable(item, where)
        elif key == "weight" and item is not None and found["role"] == "assistant":
            found |= _weight(item, where)
        elif key in TRAINED and item is False and found["role"] == "assistant":
            found["weight"] = 0
    if len({found[key] for key in REASONING if key in found}) > 1:
        keys = " and ".join(f"`{key}`" for key in REASONING if key in found)
        raise DataError(f"{keys} give different reasoning for one message", where=where, hint="leave one of them out")
    return found | ({"tool_calls": calls} if calls else {})


def _former_call(raw: dict[str, Any]) -> list[Any]:
    call = raw.get(FUNCTION_CALL)
    return [call] if isinstance(call, dict) and call.get("name") else []


def _reasoning(raw: Any, where: str, key: str) -> str:
    """Reasoning in a key of its own, as text; empty where there is none, or a flag that says whether to think."""
    return "" if raw is None or isinstance(raw, bool | int | float) else _content(raw, where, key=key)


def _weight(raw: Any, where: str) -> Message:
    if isinstance(raw, bool) or raw not in (0, 1):
        raise DataError(f"the weight of a message is 0 or 1, not {raw!r}", where=where)
    return {} if raw == 1 else {"weight": 0}


def _content(raw: Any, where: str, *, may_be_null: bool = False, key: str = "content") -> str:
    if raw is None and may_be_null:
        return ""
    if isinstance(raw, list | tuple):
        return "".join(_part(part, f"{where}, part {index}") for index, part in enumerate(raw))
    if not isinstance(raw, str):
        raise DataError(f"`{key}` must be text, not {type(raw).__name__}", where=where)
    return encodable(raw, where)


def _part(raw: Any, where: str) -> str:
    if isinstance(raw, dict):
        kind = raw.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(f"a part of type {kind!r}; only text can be trained on", where=where)
        raw = raw.get("text")
    if not isinstance(raw, str):
        raise DataError(f"a part of the content must be text, not {type(raw).__name__}", where=where)
    return encodable(raw, where)


def encodable(found: str, where: str) -> str:
    """`found`, if it has a UTF-8 form.

    Raises:
        DataError: half of a surrogate pair (such text has no UTF-8 form and no tokens).
    """
    try:
        found.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} is half of a surrogate pair", where=where) from error
    return found


# -------------------------------------------------------------------------------------------------------- tool calls


def _tool_calls(raw: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(raw, str):
        raw = _json(raw, where, "tool_calls") if raw.strip() else []
    if raw is None or raw == []:
        return []
    if not isinstance(raw, list | tuple):
        raise DataError(f"`tool_calls` must be a list, not {type(raw).__name__}", where=where)
    return [_tool_call(call, f"{where}, tool call {index}") for index, call in enumerate(raw)]


def _tool_call(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function", raw) if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise DataError("a tool call needs a function with a name", where=where)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, where, "the arguments") if arguments.strip() else {}
    else:
        arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise DataError(f"arguments must be an object, not {type(arguments).__name__}", where=where)
    encodable(json.dumps(arguments, ensure_ascii=False), where)
    kept = {key: raw[key] for key in ("id",) if isinstance(raw.get(key), str)}
    return {
        **kept,
        "type": "function",
        "function": {"name": encodable(function["name"], where), "arguments": arguments},
    }


def _call_as_text(raw: Any, where: str) -> dict[str, Any]:
    return _tool_call(_json(raw, where, "the function call") if isinstance(raw, str) else raw, where)


def _json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: not JSON: {getattr(error, 'msg', error)}", where=where) from error


# ------------------------------------------------------------------------------------------------------- typed files


def without_filled(values: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row of a typed file, its tool calls without keys that are null.

    All rows of such a file have the same keys, so that a call of one tool has the arguments of all others, as null.
    """
    return {key: _without_filled(key, value) for key, value in values.items()}


def _without_filled(key: str, raw: Any) -> Any:
    if isinstance(raw, dict):
        call = FUNCTION_CALL in (key, raw.get("role"), raw.get("from"))
        return _without_null(raw) if call else {name: _without_filled(name, item) for name, item in raw.items()}
    if not isinstance(raw, list) or not raw or not isinstance(raw[0], dict | list):
        return raw
    return _without_null(raw) if key == "tool_calls" else [_without_filled("", item) for item in raw]


def _without_null(raw: Any) -> Any:
    if isinstance(raw, dict):
        return {key: _without_null(item) for key, item in raw.items() if item is not None}
    return [_without_null(item) for item in raw] if isinstance(raw, list | tuple) else raw
