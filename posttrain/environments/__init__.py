"""Environments that a policy acts in over several turns, by the name that a recipe gives as `type`.

An environment is one file: a class with its `Config`, and `load`, which makes of such a section what makes instances
(`base.Made`). `pool` has the processes that they run in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.registry import Registry

if TYPE_CHECKING:
    from posttrain.config.environment import EnvironmentConfig
    from posttrain.environments.base import Made

ENVIRONMENTS: Registry[Any] = Registry(
    "environment",
    {
        "rooms": "posttrain.environments.rooms:Rooms",
        "python": "posttrain.environments.python:PythonEnvironment",
        "tools": "posttrain.environments.tools:Tools",
        "recorded": "posttrain.environments.recorded:Recorded",
        "gymnasium": "posttrain.environments.gymnasium:GymnasiumText",
        "verifiers": "posttrain.environments.verifiers:VerifiersEnvironment",
    },
)


def maker(config: EnvironmentConfig) -> Made:
    """What makes the environments of a recipe. Runs the user's files, where it names some.

    Raises:
        WorldError: the user's code cannot be loaded, or makes something else than an environment.
    """
    return ENVIRONMENTS[config.type].load(config)
