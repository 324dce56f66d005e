"""Environments of PyPI's package `verifiers`, up to 0.3: a `MultiTurnEnv` with `env_response` and a rubric.

There the environment owns the loop and asks a client for replies. Here posttrain samples, and between two replies does
what `MultiTurnEnv.rollout` does: a step of the trajectory, the stop conditions, `env_response`; at the end the clean-up
and the rubric. The loaded environment serves all episodes of its process, as it serves all rollouts there; what belongs
to one episode is in its `state`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.own_code import CodeName, OwnCode, find
from posttrain.data.sample import Problem
from posttrain.environments.base import Made, Step
from posttrain.environments.own_code import guarded, own
from posttrain.errors import WorldError

OWN_LOOP = ("rollout", "get_model_response", "get_prompt_messages", "add_model_response", "render_completion")
"""Methods of `MultiTurnEnv` that an environment may not have of its own: it would ask the model, or rewrite history."""

HINT = "pip install 'verifiers>=0.1.14,<0.4'"


class VerifiersEnvironment:
    """One episode.

    Args:
        environment: the `MultiTurnEnv`.
        runner: the event loop that its methods run in.
    """

    class Config(EnvironmentConfig):
        """A `MultiTurnEnv` of the package verifiers, from 0.1.14 to 0.3 (docs/agents.md)."""

        type: Literal["verifiers"] = "verifiers"
        factory: CodeName = Field(
            description="makes it: `game.py:load_environment`, from the recipe's folder, else the working directory; "
            "or `package.module:load_environment`"
        )
        options: dict[str, Any] = Field(default_factory=dict, description="what it is made with, by name")

        def check_installed(self) -> None:
            if importlib.util.find_spec("verifiers") is None:
                raise WorldError("verifiers is not installed", where="environment.type", hint=HINT)
            found = version("verifiers")
            if not playable(found):
                raise WorldError(
                    f"verifiers {found} is installed, whose environments have another form than those of 0.1.14 to 0.3",
                    where="environment.type",
                    hint=HINT,
                )

        @property
        def codes(self) -> list[OwnCode]:
            return [find(self.factory)]

    def __init__(self, environment: Any, runner: asyncio.Runner) -> None:
        self._environment, self._runner = environment, runner

    @classmethod
    def load(cls, config: VerifiersEnvironment.Config) -> Made:
        """See `environments.maker`."""
        config.check_installed()
        with _signals_kept():
            made = own(config.factory, lambda make: make(**config.options))
            reason = guarded(config.factory, lambda: _refusal(made))
        if reason:
            raise WorldError(reason, where=config.factory, hint="see docs/agents.md, environments of verifiers")
        # What ends an episode there is judged by the rubric; so the recipe's limit is one of its own.
        made.max_turns = min(made.max_turns, config.max_turns) if made.max_turns > 0 else config.max_turns
        runner = asyncio.Runner()
        return Made(lambda: cls(made, runner))

    def reset(self, problem: Problem, seed: int) -> str:
        """See `Environment.reset`: what `setup_state` put behind the prompt.

        Raises:
            ValueError: it changed the prompt otherwise, or the row brings tools.
        """
        return self._runner.run(self._begun(problem))

    def step(self, action: str) -> Step:
        """See `Environment.step`. The reward comes at the end, from the rubric."""
        return self._runner.run(self._answered(action))

    async def _begun(self, problem: Problem) -> str:
        from verifiers.utils.message_utils import normalize_messages

        said = [{"role": "user", "content": problem.prompt}] if isinstance(problem.prompt, str) else problem.prompt
        row = {
            "example_id": 0,
            "answer": problem.reference or "",
            **problem.meta,
            "prompt": [dict(one) for one in said],
        }
        self._state = await self._environment.init_state(row, _no_client(), "policy")
        if self._state["tool_defs"]:
            raise ValueError("the row brings tools, which are not shown to the policy")
        before = list(self._state["prompt"])
        # 0.1 changes the state in place, 0.3 may return another one.
        self._state = await self._environment.setup_state(self._state) or self._state
        after = normalize_messages(self._state["prompt"])
        if after[: len(before)] != before:
            raise ValueError("setup_state changes the prompt, behind which alone it may put something")
        self._told = after
        return _text(after[len(before) :])

    async def _answered(self, action: str) -> Step:
        from verifiers.types import Response, ResponseMessage

        environment, state = self._environment, self._state
        message = ResponseMessage(content=action, finish_reason="stop", is_truncated=False)
        response = Response(id="", created=0, model="policy", message=message)
        await environment.add_model_response(state, self._told, response)
        if await environment.is_completed(state):
            return await self._judged()
        told = await environment.get_prompt_messages(state)
        # As there: what `env_response` changed is looked at behind the next reply, but for a final answer.
        if state.get("final_env_response") is not None and await environment.is_completed(state):
            return await self._judged()
        observation = _text(told[len(self._told) + 1 :])
        self._told = told
        return Step(observation)

    async def _judged(self) -> Step:
        environment, state = self._environment, self._state
        await environment.cleanup(state)  # writes `completion` first, which the rubric reads
        if state["error"] is not None:
            raise state["error"]
        await environment.rubric.score_rollout(state)
        await environment.rubric.cleanup(state)
        return Step(reward=float(state["reward"]), done=True)


def playable(version: str) -> bool:
    """Whether this version of the package has environments of the form that is played here. 0.4 has others alone."""
    return (0, 1, 14) <= tuple(int(part) for part in version.split(".")[:3] if part.isdecimal()) < (0, 4)


def _refusal(environment: Any) -> str | None:
    """Why posttrain cannot play this environment; None if it can."""
    from verifiers.envs.multiturn_env import MultiTurnEnv
    from verifiers.envs.singleturn_env import SingleTurnEnv

    kind = type(environment)
    if not isinstance(environment, MultiTurnEnv):
        return f"it makes a {kind.__name__}, which is no MultiTurnEnv of verifiers"
    for name in OWN_LOOP:
        if getattr(kind, name) not in (getattr(MultiTurnEnv, name), getattr(SingleTurnEnv, name)):
            return f"{kind.__name__} has its own `{name}`, and posttrain asks the policy itself"
    if environment.tool_defs:
        return f"{kind.__name__} has tools, which are given as `environment: {{type: tools}}`"
    if environment.requires_group_rollouts or environment.provides_advantages:
        return f"the rubric of {kind.__name__} judges groups of rollouts, and posttrain asks it for one at a time"
    return None


def _text(messages: Sequence[Any]) -> str:
    """What messages of the user say, as one text.

    Raises:
        ValueError: one is of another role, or is more than text.
    """
    for message in messages:
        if message.role != "user" or not isinstance(message.content, str):
            raise ValueError(
                f"the environment answered with a message of the role {message.role} that is no user's text"
            )
    return "\n\n".join(message.content for message in messages)


def _no_client() -> Any:
    """What stands in the state for a model that nobody asks."""
    from verifiers.clients import Client

    async def get_response(*_: Any, **__: Any) -> None:
        raise RuntimeError("the environment asks the policy by itself, and posttrain does that")

    abstract = dict.fromkeys(Client.__abstractmethods__)
    return type("NoClient", (Client,), {**abstract, "get_response": get_response})(None)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """An environment takes SIGINT and SIGTERM for itself when it is made; behind the block they are as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
