"""Environments that a policy acts in over several turns, and the processes that they run in."""

from __future__ import annotations

from collections.abc import Callable

from posttrain.config.own_code import find, in_short, load
from posttrain.config.schema import EnvironmentConfig, PythonEnvironmentConfig
from posttrain.environments.base import Environment
from posttrain.environments.rooms import Rooms
from posttrain.errors import WorldError


def maker(config: EnvironmentConfig) -> Callable[[], Environment]:
    """What makes a fresh instance for each episode. Runs the user's file, where the recipe names one.

    Raises:
        WorldError: the user's code cannot be loaded, or makes something else than an environment.
    """
    if not isinstance(config, PythonEnvironmentConfig):
        options = config.model_dump(include={"noise", "crash", "hang", "shaped"})
        return lambda: Rooms(**options)
    code = find(config.factory)
    try:
        make = getattr(load(code.place), code.name)
        made = make(**config.options)
    # Whatever the user's code raises while it is loaded is a mistake in it, to be shown as such.
    except Exception as error:
        raise WorldError(in_short(error), where=str(code)) from error
    for name in ("reset", "step"):
        if not callable(getattr(made, name, None)):
            raise WorldError(
                f"it makes a {type(made).__name__} without a method `{name}`",
                where=str(code),
                hint="reset(problem, seed) gives the first observation, step(action) a Step (docs/agents.md)",
            )
    return lambda: make(**config.options)
