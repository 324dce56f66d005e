"""Environments that a policy acts in over several turns, and the processes that they run in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config.own_code import find, in_short, load
from posttrain.config.schema import (
    EnvironmentConfig,
    GymnasiumConfig,
    PythonEnvironmentConfig,
    RecordedConfig,
    RoomsConfig,
    ToolsConfig,
)
from posttrain.environments.base import Environment
from posttrain.environments.gymnasium import GymnasiumText
from posttrain.environments.rooms import Rooms
from posttrain.environments.tools import Tools
from posttrain.errors import DataError, WorldError


class Made(NamedTuple):
    """A loaded environment.

    Attributes:
        make: makes a fresh instance for each episode.
        tools: JSON descriptions of what the policy may call, for the chat template.
    """

    make: Callable[[], Environment]
    tools: tuple[dict[str, Any], ...] = ()


def maker(config: EnvironmentConfig) -> Made:
    """What makes the environments of a recipe. Runs the user's files, where it names some.

    Raises:
        WorldError: the user's code cannot be loaded, or makes something else than an environment.
    """
    if isinstance(config, RoomsConfig):
        options = config.model_dump(include={"noise", "crash", "hang", "shaped"})
        return Made(lambda: Rooms(**options))
    if isinstance(config, ToolsConfig):
        return _tools(config)
    if isinstance(config, RecordedConfig):
        return _recorded(config)
    if isinstance(config, GymnasiumConfig):
        return _gymnasium(config)
    return _own(config)


def _own(config: PythonEnvironmentConfig) -> Made:
    made = _run(config.factory, lambda make: make(**config.options))
    for name in ("reset", "step"):
        if not callable(getattr(made, name, None)):
            raise WorldError(
                f"it makes a {type(made).__name__} without a method `{name}`",
                where=config.factory,
                hint="reset(problem, seed) gives the first observation, step(action) a Step (docs/agents.md)",
            )
    make = _run(config.factory, lambda found: found)
    return Made(lambda: make(**config.options))


def _recorded(config: RecordedConfig) -> Made:
    from posttrain.data.episodes import read_episodes  # which imports this package
    from posttrain.environments.recorded import Recorded, by_words

    grade = by_words if config.grade is None else _run(config.grade, lambda found: found)
    try:
        episodes = [episode for path in config.paths for episode in read_episodes(Path(path))]
    except DataError as error:
        raise WorldError(error.what, where=error.where, hint=error.hint) from error
    return Made(lambda: Recorded(episodes, config.patches, grade, config.format_reward))


def _gymnasium(config: GymnasiumConfig) -> Made:
    if importlib.util.find_spec("gymnasium") is None:
        raise WorldError(
            "gymnasium is not installed", where="environment.type", hint="pip install 'posttrain[gymnasium]'"
        )
    import gymnasium

    try:
        gymnasium.spec(config.id)
    except gymnasium.error.Error as error:
        raise WorldError(in_short(error), where="environment.id") from error
    return Made(lambda: GymnasiumText(config.id, config.options, config.columns, config.actions))


def _tools(config: ToolsConfig) -> Made:
    functions = [_run(written, lambda found: found) for written in config.functions]
    factory = None if config.factory is None else _run(config.factory, lambda found: found)

    def make() -> Tools:
        return Tools(functions, None if factory is None else factory(), config.calls)

    if config.factory is not None and not callable(getattr(_run(config.factory, lambda found: found()), "reset", None)):
        raise WorldError("it makes something without a method `reset`", where=config.factory)
    where = config.factory or config.functions[0]
    return Made(make, _guarded(where, lambda: make().schemas))


def _run(written: str, use: Callable[[Any], Any]) -> Any:
    """What is made of the code of the user's own that is named so."""
    code = find(written)
    return _guarded(written, lambda: use(getattr(load(code.place), code.name)))


def _guarded(where: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    # Whatever the user's code raises while it is loaded is a mistake in it, to be shown as such.
    except Exception as error:
        raise WorldError(in_short(error), where=where) from error
