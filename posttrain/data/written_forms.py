"""Rows in the forms that other tools read: messages, ShareGPT, Alpaca, prompt and completion, pairs without a prompt.

What is written reads back as what it was, up to one thing: a text prompt has become a message where the form knows
messages only. A row that a form has no place for is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from posttrain.data.formats import Format, split_implicit_prompt
from posttrain.data.messages import FUNCTION_CALL
from posttrain.data.sample import Example, Message, Preference, Problem, Stepwise, Unpaired
from posttrain.errors import DataError, RecipeError, nearest

Item = Problem | Example | Preference | Unpaired | Stepwise
Text = str | tuple[Message, ...]
Row = dict[str, Any]

_SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation"}


def written(item: Item, form: str) -> Row:
    """The columns of a row in a form, without those of its problem.

    Args:
        form: a key of `FORMS`.

    Raises:
        RecipeError: no such form, or not for rows of this kind.
        DataError: the form has no place for something that the row says.
    """
    if form not in FORMS:
        raise RecipeError(f"no form {form!r}", where="--form", hint=nearest(form, FORMS))
    kind, make = FORMS[form]
    if not isinstance(item, kind):
        fitting = ", ".join(name for name, (other, _) in FORMS.items() if isinstance(item, other)) or "none"
        raise RecipeError(
            f"rows of this kind have no form {form!r}", where="--form", hint=f"forms of theirs: {fitting}"
        )
    return make(item)


def _prompt_completion(item: Example) -> Row:
    return {"prompt": _plain(item.problem.prompt), "completion": _plain(item.completion)}


def _messages(item: Example) -> Row:
    return {"messages": _conversation(item)}


def _sharegpt(item: Example) -> Row:
    turns: list[Row] = []
    for turn in _conversation(item):
        rest = {key: value for key, value in turn.items() if key not in ("role", "content", "tool_calls")}
        calls = turn.get("tool_calls") or []
        if len(calls) > 1 or (calls and (turn["content"].strip() or rest)):
            raise _no_place(item, "ShareGPT", "several calls of tools, or one beside other things, in a message")
        if calls:
            call = {key: calls[0][key] for key in ("id",) if key in calls[0]} | calls[0]["function"]
            turns.append({"from": FUNCTION_CALL, "value": json.dumps(call, ensure_ascii=False)})
        else:
            turns.append({"from": _SHAREGPT.get(turn["role"], turn["role"]), "value": turn["content"], **rest})
    return {"conversations": turns}


def _alpaca(item: Example) -> Row:
    turns = _conversation(item)
    if any(set(turn) - {"role", "content", "weight"} for turn in turns):
        raise _no_place(item, "Alpaca", "calls of tools, or reasoning in a key of its own")
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    asked = turns[0 if system is None else 1 :]
    if [turn["role"] for turn in asked] != ["user", "assistant"] * (len(asked) // 2):
        raise _no_place(item, "Alpaca", "other turns than question and answer by turns")
    if any("weight" not in turn for turn in asked[1:-1:2]):  # its history is context
        raise _no_place(item, "Alpaca", "several trained turns")
    *earlier, last, reply = (turn["content"] for turn in asked)
    row: Row = {"instruction": last, "input": "", "output": reply}
    if earlier:
        row["history"] = [list(pair) for pair in zip(earlier[::2], earlier[1::2], strict=True)]
    return row | ({} if system is None else {"system": system})


def _preference(item: Preference) -> Row:
    responses = {"chosen": item.chosen, "rejected": item.rejected, **item.others}
    return {"prompt": _plain(item.problem.prompt)} | {role: _plain(each) for role, each in responses.items()}


def _preference_implicit(item: Preference) -> Row:
    prompt = item.problem.prompt
    whole = {role: _joined(item, prompt, each) for role, each in (("chosen", item.chosen), ("rejected", item.rejected))}
    if item.others:
        raise _no_place(item, "pairs without a prompt column", "further responses")
    read = split_implicit_prompt(whole["chosen"], whole["rejected"], item.problem.where)
    if read[0] != prompt:
        raise _no_place(item, "pairs without a prompt column", "responses that begin alike")
    return {role: _plain(each) for role, each in whole.items()}


FORMS: dict[str, tuple[type, Callable[[Any], Row]]] = {
    Format.PROMPT_COMPLETION.value: (Example, _prompt_completion),
    Format.MESSAGES.value: (Example, _messages),
    Format.SHAREGPT.value: (Example, _sharegpt),
    Format.ALPACA.value: (Example, _alpaca),
    Format.PREFERENCE.value: (Preference, _preference),
    Format.PREFERENCE_IMPLICIT.value: (Preference, _preference_implicit),
}
"""The kind of rows that each form is of, and its columns."""


def _conversation(item: Example) -> list[Row]:
    """All turns; assistant turns of the prompt, which are not trained on, with a weight of 0."""
    prompt, completion = item.problem.prompt, item.completion
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if isinstance(completion, str):
        completion = completion.lstrip() if item.problem.repeated else completion
        completion = ({"role": "assistant", "content": completion},)
    context = [{**turn, "weight": 0} if turn["role"] == "assistant" else dict(turn) for turn in turns]
    return [*context, *(dict(turn) for turn in completion)]


def _joined(item: Preference, prompt: Any, response: Any) -> Text:
    if isinstance(prompt, str) != isinstance(response, str):
        raise _no_place(item, "pairs without a prompt column", "a text beside messages")
    return prompt + response


def _no_place(item: Example | Preference, form: str, what: str) -> DataError:
    where = item.problem.where or item.problem.id
    return DataError(f"{form} has no place for {what}", where=where, hint="leave the row out, or take another form")


def _plain(value: Text) -> Any:
    return value if isinstance(value, str) else [dict(message) for message in value]
