"""Taking in what agents of others did: conversations with rewards, as episodes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from posttrain.config.collection import TakeInEpisodesConfig
from posttrain.data.episodes import Episode, Stop, Turn, write_episodes
from posttrain.data.sample import Example, Message, Problem
from posttrain.data.sources import examples
from posttrain.environments.base import Step
from posttrain.errors import DataError, StateError
from posttrain.rollouts.provenance import problem_content


def take_in_episodes(config: TakeInEpisodesConfig) -> list[Episode]:
    """Episodes of written conversations, in the file that the settings name.

    An assistant turn is an action, what follows it is the environment's answer. Calls of tools become text in the form
    of Hermes, which environments of tools read. Conversations with the same beginning are of one problem.

    Raises:
        StateError: the output is there already.
        DataError: no rows, a bad row, a conversation that is no episode, or a reward or success that is missing.
    """
    output = Path(config.output)
    if output.exists():
        raise StateError("this file is there already", where=str(output), hint="choose another `output`")
    problem_of: dict[str, Problem] = {}
    counts: dict[str, int] = {}
    episodes = []
    for row in examples(config.data.completions, "completions"):
        told = {name for name in (config.reward, config.success) if name is not None}
        meta = {name: value for name, value in row.problem.meta.items() if name not in told}
        problem = replace(row.problem, meta=meta)
        problem = problem_of.setdefault(problem_content(problem), problem)
        counts[problem.id] = counts.get(problem.id, -1) + 1
        episodes.append(_episode(row, problem, counts[problem.id], config))
    write_episodes(output, episodes)
    return episodes


def _episode(row: Example, problem: Problem, number: int, config: TakeInEpisodesConfig) -> Episode:
    where = row.problem.where or row.problem.id
    if isinstance(row.completion, str) or isinstance(problem.prompt, str):
        raise DataError("an episode is a conversation, not a text", where=where, hint="name its column: `messages`")
    actions = _actions(row.completion, where)
    rewards = _rewards(row.problem.meta, config.reward, len(actions), where)
    success = None if config.success is None else _success(row.problem.meta, config.success, where)
    turns = []
    for index, ((action, answers), reward) in enumerate(zip(actions, rewards, strict=True)):
        done = index == len(actions) - 1
        told = "\n".join(text for _, text in answers)
        results = tuple((name, text) for name, text in answers if name is not None)
        turns.append(Turn(action, Step(told, reward, done, success if done else None, results=results)))
    return Episode(problem, number, seed=0, prompt=tuple(problem.prompt), turns=turns, stop=Stop.DONE)


def _actions(messages: Sequence[Message], where: str) -> list[tuple[str, list[tuple[str | None, str]]]]:
    """The text of each action, and of each answer to it with the name of the tool; None for a user's."""
    found: list[tuple[str, list[tuple[str | None, str]]]] = []
    names: list[tuple[str | None, str]] = []
    for role, group in groupby(messages, key=lambda message: message["role"]):
        said = list(group)
        if role == "assistant":
            if len(said) > 1:
                raise DataError(
                    "two assistant turns with nothing between them: which action was answered?", where=where
                )
            calls = [(call.get("id"), call["function"]) for call in said[0].get("tool_calls", ())]
            names = [(number, function["name"]) for number, function in calls]
            found.append((_action(said[0], [function for _, function in calls], where), []))
        elif found[-1][1]:
            raise DataError(
                f"a turn of {role} behind one of another role: an action has one kind of answer", where=where
            )
        elif role == "tool":
            found[-1][1].extend(
                (_tool(message, index, names), message["content"]) for index, message in enumerate(said)
            )
        elif role == "user" and len(said) == 1:
            found[-1][1].append((None, said[0]["content"]))
        else:
            raise DataError(f"an action is answered by tools or by one turn of the user, not by {role}", where=where)
    return found


def _action(message: Message, calls: list[dict[str, Any]], where: str) -> str:
    left = sorted(message.keys() - {"role", "content", "tool_calls"})
    if left:
        hint = "put reasoning into the text; every action of an episode is trained on"
        raise DataError(f"an assistant turn has `{left[0]}`, which an action has no place for", where=where, hint=hint)
    written = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    texts = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in written]
    return "\n".join([*([message["content"]] if message["content"] else []), *texts])


def _tool(message: Message, index: int, names: list[tuple[str | None, str]]) -> str:
    """Which tool says this: by its own word, by the number of a call, or by the order of calls."""
    if "name" in message:
        return str(message["name"])
    by_number = {number: name for number, name in names if number is not None}
    if message.get("tool_call_id") in by_number:
        return by_number[message["tool_call_id"]]
    return names[index][1] if index < len(names) else "tool"


def _rewards(meta: dict[str, Any], column: str, turns: int, where: str) -> list[float]:
    if column not in meta:
        raise DataError(f"no column {column!r} with the reward", where=where, hint="name it: `reward`")
    value = meta[column]
    if isinstance(value, list):
        if len(value) != turns:
            raise DataError(f"{column}: {len(value)} rewards of {turns} assistant turns", where=where)
        return [_number(each, column, where) for each in value]
    return [0.0] * (turns - 1) + [_number(value, column, where)]


def _number(value: Any, column: str, where: str) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise DataError(f"{column}: a reward must be a finite number, not {value!r:.40}", where=where)


def _success(meta: dict[str, Any], column: str, where: str) -> bool:
    if isinstance(value := meta.get(column), bool):
        return value
    raise DataError(f"{column}: whether it was solved must be true or false, not {value!r:.40}", where=where)
