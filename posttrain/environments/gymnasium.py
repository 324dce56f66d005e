"""Environments of Gymnasium with numbered actions and something to read: FrozenLake, CliffWalking, Taxi, Blackjack.

The policy names an action by its word. It is shown what the environment draws as text (`render_mode: ansi`), or the
observation itself where it draws none. Where a terminal would colour a place, it stands in brackets.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.own_code import in_short
from posttrain.data.sample import Problem
from posttrain.environments.base import ActionError, Made, Step
from posttrain.errors import WorldError

_COLOURED = re.compile(r"\x1b\[[0-9;]*m(.*?)\x1b\[0m", re.DOTALL)


class GymnasiumText:
    """One episode.

    Args:
        id: of the environment, as `gymnasium.make` takes it.
        options: its further arguments.
        columns: names of columns of the problem that are arguments too.
        actions: a word for each action, in the order of their numbers.
    """

    class Config(EnvironmentConfig):
        """An environment of Gymnasium with numbered actions that can be read as text (docs/agents.md)."""

        type: Literal["gymnasium"] = "gymnasium"
        id: str = Field(description="as `gymnasium.make` takes it: FrozenLake-v1")
        actions: list[str] = Field(min_length=1, description="a word for each action, in the order of their numbers")
        options: dict[str, Any] = Field(default_factory=dict, description="further arguments of `gymnasium.make`")
        columns: list[str] = Field(
            default_factory=list, description="columns of the problems that are arguments too, so that each has its own"
        )

        def check_installed(self) -> None:
            if importlib.util.find_spec("gymnasium") is None:
                hint = "pip install 'posttrain[gymnasium]'"
                raise WorldError("gymnasium is not installed", where="environment.type", hint=hint)

        @property
        def runs(self) -> list[str]:
            module, colon, _ = self.id.partition(":")  # which `gymnasium.make` imports
            return [f"the module {module}"] if colon else []

    def __init__(self, id: str, options: Mapping[str, Any], columns: Sequence[str], actions: Sequence[str]) -> None:
        self.id, self.options, self.columns, self.actions = id, options, columns, list(actions)

    @classmethod
    def load(cls, config: GymnasiumText.Config) -> Made:
        """See `environments.maker`."""
        config.check_installed()
        import gymnasium

        try:
            gymnasium.spec(config.id)
        except gymnasium.error.Error as error:
            raise WorldError(in_short(error), where="environment.id") from error
        return Made(lambda: cls(config.id, config.options, config.columns, config.actions))

    def reset(self, problem: Problem, seed: int) -> str:
        """What is to be seen. The environment draws from `seed`."""
        import gymnasium

        own = {column: problem.meta[column] for column in self.columns}
        modes = gymnasium.spec(self.id).entry_point
        metadata = gymnasium.envs.registration.load_env_creator(modes).metadata if isinstance(modes, str) else {}
        draws = {"render_mode": "ansi"} if "ansi" in metadata.get("render_modes", ()) else {}
        self._environment = gymnasium.make(self.id, **draws, **self.options, **own)
        wanted = getattr(self._environment.action_space, "n", None)
        if wanted != len(self.actions):
            raise ValueError(
                f"{self.id} has {wanted or 'no'} numbered actions, and there are {len(self.actions)} words"
            )
        observation, _ = self._environment.reset(seed=seed % 2**32)
        return self._seen(observation)

    def step(self, action: str) -> Step:
        """See `Environment.step`. Whether an episode was won, its return says; one that ran out of time was not."""
        word = action.strip()
        if word not in self.actions:
            raise ActionError(f"say one of: {', '.join(self.actions)}")
        observation, reward, terminated, truncated, _ = self._environment.step(self.actions.index(word))
        over = bool(terminated or truncated)
        return Step(self._seen(observation), float(reward), over, success=False if truncated else None)

    def _seen(self, observation: Any) -> str:
        drawn = self._environment.render() if self._environment.render_mode == "ansi" else str(observation)
        return _COLOURED.sub(r"[\1]", drawn).strip()
