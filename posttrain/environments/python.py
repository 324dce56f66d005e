"""A class of the user's own as an environment, from a file or an installed module."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.own_code import CodeName, OwnCode, find
from posttrain.environments.base import Made
from posttrain.environments.own_code import own
from posttrain.errors import WorldError


class PythonEnvironment:
    """What the user's class is to a recipe; an episode has an instance of that class."""

    class Config(EnvironmentConfig):
        """A class of your own, from a file or an installed module (docs/agents.md)."""

        type: Literal["python"] = "python"
        factory: CodeName = Field(
            description="`shop.py:Shop`, from the recipe's folder, else the working directory; or `package.module:name`"
        )
        options: dict[str, Any] = Field(default_factory=dict, description="what it is made with, by name")

        @property
        def codes(self) -> list[OwnCode]:
            return [find(self.factory)]

    @classmethod
    def load(cls, config: PythonEnvironment.Config) -> Made:
        """See `environments.maker`."""
        made = own(config.factory, lambda make: make(**config.options))
        for name in ("reset", "step"):
            if not callable(getattr(made, name, None)):
                raise WorldError(
                    f"it makes a {type(made).__name__} without a method `{name}`",
                    where=config.factory,
                    hint="reset(problem, seed) gives the first observation, step(action) a Step (docs/agents.md)",
                )
        make = own(config.factory)
        return Made(lambda: make(**config.options))
