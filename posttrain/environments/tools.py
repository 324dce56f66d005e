"""Tools as an environment: Python functions that the policy calls, and classes of TRL's `environment_factory`.

A reply with calls runs them and is answered with what they return; a reply without any is the answer, and the end. A
call that cannot be read, names no tool or raises is answered with one line that says so, and counts as invalid.

A class as TRL takes it needs no change: `reset(**row)` may return text, its public methods are the tools, and
`get_reward()`, if it has one, is asked once at the end. Other than there, a fresh instance serves every episode, in a
process with a clock; what `reset` returns is a paragraph of its own; and where the instance has an attribute `done`
that is true, the episode ends.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.own_code import CodeName, OwnCode, find
from posttrain.data.sample import Problem
from posttrain.environments.base import Made, Step
from posttrain.environments.own_code import guarded, own
from posttrain.errors import WorldError, nearest

MAX_ERROR = 500
"""Characters of an error that the policy is told."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """One call as the policy wrote it."""

    name: str
    arguments: Mapping[str, Any]


class Tools:
    """One episode with tools.

    Args:
        functions: tools that belong to no instance.
        instance: an object of a class of TRL's form; None without one.
        form: how calls are written, a key of `FORMS`.
    """

    class Config(EnvironmentConfig):
        """Python functions that the policy may call, and classes of TRL's `environment_factory` (docs/agents.md).

        A reply without a call ends the episode; `verifier` judges it, if there is one."""

        type: Literal["tools"] = "tools"
        functions: list[CodeName] = Field(
            default_factory=list, description="`tools.py:add`, as `factory`; typed, with a Google docstring"
        )
        factory: CodeName | None = Field(
            None, description="a class with `reset`, methods that are tools, and perhaps `get_reward`: `shop.py:Shop`"
        )
        calls: Literal["hermes", "json"] = Field(
            "hermes", description="how the policy writes calls: in <tool_call> tags, or the reply is one JSON object"
        )

        @property
        def rewards(self) -> bool:
            return self.factory is not None

        @property
        def judged(self) -> bool:
            return True

        @property
        def codes(self) -> list[OwnCode]:
            return [find(each) for each in (*self.functions, self.factory) if each is not None]

        @model_validator(mode="after")
        def _some_tool(self) -> Tools.Config:
            if not self.functions and self.factory is None:
                raise ValueError("give `functions`, or a `factory`, or both")
            return self

    def __init__(self, functions: Sequence[Callable[..., Any]], instance: Any | None, form: str) -> None:
        self._instance, self._read = instance, FORMS[form]
        self._tools = {function.__name__: function for function in functions}
        # On the class: looking at the instance would run its properties.
        for name, _ in inspect.getmembers(type(instance), inspect.isfunction) if instance is not None else ():
            if name not in ("reset", "get_reward") and not name.startswith("_"):
                self._tools[name] = getattr(instance, name)

    @classmethod
    def load(cls, config: Tools.Config) -> Made:
        """See `environments.maker`."""
        functions = [own(written) for written in config.functions]
        factory = None if config.factory is None else own(config.factory)

        def make() -> Tools:
            return cls(functions, None if factory is None else factory(), config.calls)

        if config.factory is not None:
            made = own(config.factory, lambda found: found())
            if not callable(getattr(made, "reset", None)):
                raise WorldError("it makes something without a method `reset`", where=config.factory)
        where = config.factory or config.functions[0]
        return Made(make, guarded(where, lambda: make().schemas))

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        """Descriptions of the tools, from signatures and Google docstrings, for the chat template.

        Raises:
            Exception: of transformers, for a parameter without a type or without a description.
        """
        from transformers.utils import get_json_schema

        return tuple(get_json_schema(tool) for tool in self._tools.values())

    def reset(self, problem: Problem, seed: int) -> str:
        """See `Environment.reset`. The instance gets the prompt and the further columns of the row by name."""
        if self._instance is None:
            return ""
        seen = _waited(self._instance.reset(**{"prompt": problem.prompt, **problem.meta}))
        return "" if seen is None else seen

    def step(self, action: str) -> Step:
        """See `Environment.step`."""
        try:
            calls = self._read(action)
        except ValueError as error:
            return Step(f"Error: this is no tool call: {error}"[:MAX_ERROR], valid=False)
        if not calls:
            return Step(reward=self._reward(), done=True)
        answers = [self._answer(call) for call in calls]
        results = tuple((call.name, text) for call, (text, _) in zip(calls, answers, strict=True))
        done = bool(getattr(self._instance, "done", False))
        reward, valid = self._reward() if done else 0.0, all(fine for _, fine in answers)
        return Step("\n".join(text for _, text in results), reward, done, valid=valid, results=results)

    def _answer(self, call: ToolCall) -> tuple[str, bool]:
        """What a tool returned, as text, and whether it ran."""
        tool = self._tools.get(call.name)
        if tool is None:
            return f"Error: unknown tool {call.name!r}; {nearest(call.name, self._tools)}"[:MAX_ERROR], False
        try:
            return str(_waited(tool(**call.arguments))), True
        # What a tool raises is its answer: the policy is to see it.
        except Exception as error:
            return " ".join(f"Error: {type(error).__name__}: {error}".split())[:MAX_ERROR], False

    def _reward(self) -> float:
        asked = getattr(self._instance, "get_reward", None)
        return 0.0 if asked is None else float(_waited(asked()))


def _waited(value: Any) -> Any:
    """The value, or of an `async` function what it comes to."""
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def _hermes(text: str) -> list[ToolCall]:
    # Looked through once: a pattern would look for the end from every beginning, and take minutes.
    written = [each.partition(_CLOSE) for each in text.split(_OPEN)[1:]]
    if not all(end for _, end, _ in written):
        raise ValueError(f"{_OPEN} without {_CLOSE}")
    return [_call(each, "arguments") for each, _, _ in written]


def _json(text: str) -> list[ToolCall]:
    written = text.strip()
    return [_call(written, "parameters", "arguments")] if written.startswith("{") else []


def _call(written: str, *keys: str) -> ToolCall:
    """One call of a JSON object.

    Raises:
        ValueError: it is none, in words for the policy.
    """
    try:
        value = json.loads(written)
    except RecursionError as error:  # else the environment would have failed, and nobody judges such an episode
        raise ValueError("it is nested too deeply") from error
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise ValueError('it is no {"name": ..., ...}')
    arguments: Any = next((value[key] for key in keys if key in value), {})
    if not isinstance(arguments, dict):
        raise ValueError(f"the {keys[0]} of {name} are no object")
    return ToolCall(name, arguments)


FORMS: Mapping[str, Callable[[str], list[ToolCall]]] = {"hermes": _hermes, "json": _json}
"""How a reply is read: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` among other text, any number of them
(Hermes, Qwen, SmolLM3); or a reply that is one object of name and parameters (Llama 3). Raises ValueError for a
call that cannot be read."""
