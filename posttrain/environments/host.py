"""Holds the environments of several episodes and calls them, so that none touches another's random numbers."""

from __future__ import annotations

import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config.own_code import in_short
from posttrain.data.sample import Problem
from posttrain.environments.base import ActionError, Environment, Failure, Fault, Step
from posttrain.environments.pictures import without_pictures

MAX_OBSERVATION = 100_000
"""Characters of an observation that leave the environment; of a longer one the middle is left out."""

MAX_DETAIL = 300


class Reset(NamedTuple):
    """Begin an episode."""

    episode: int
    problem: Problem
    seed: int


class Act(NamedTuple):
    """Go on with one."""

    episode: int
    action: str


class EpisodeEnd(NamedTuple):
    """Forget one. Nothing is answered."""

    episode: int


Call = Reset | Act | EpisodeEnd
Answer = str | Step | Failure
"""Of a reset the first observation, of an action the step."""


class EnvironmentHost:
    """Calls environments one after another.

    Around each call the global random numbers (`random`, numpy's and torch's where they are imported) are those of the
    episode, seeded with its seed; outside of it they are as they were.

    Args:
        make: makes an environment.
        folder: where each episode has a folder of its own, which is the working directory in its calls; None: the
            working directory is what it is.
    """

    def __init__(self, make: Callable[[], Environment], folder: Path | None = None) -> None:
        self._make, self._folder = make, folder
        self._environments: dict[int, Environment] = {}
        self._numbers: dict[int, _Numbers] = {}

    def call(self, call: Reset | Act) -> Answer:
        """What came of it. What an environment raises ends the episode, but for an `ActionError`."""
        mine = os.getpid()
        if isinstance(call, Reset):
            self._numbers[call.episode] = _Numbers(call.seed)
        try:
            with self._numbers[call.episode].in_place(), self._at_home(call):
                answer = self._answer(call)
        except ActionError as error:
            return Step(f"Error: {error}"[:MAX_OBSERVATION], valid=False)
        # Whatever the environment raises is the end of its episode, never of the run.
        except Exception as error:
            traceback.print_exception(error)  # into the log
            answer = Failure(Fault.CRASH, in_short(error)[:MAX_DETAIL])
        if os.getpid() != mine:  # the environment has forked, and this is the child
            os._exit(0)
        if isinstance(answer, Failure):
            self.end(call.episode)
        return answer

    def end(self, episode: int) -> None:
        """Forget an episode."""
        self._environments.pop(episode, None)
        self._numbers.pop(episode, None)
        if self._folder is not None:
            shutil.rmtree(self._folder / str(episode), ignore_errors=True)

    @contextmanager
    def _at_home(self, call: Reset | Act) -> Iterator[None]:
        """Inside the block the working directory is the episode's, as long as it leaves it there."""
        if self._folder is None:
            yield
            return
        home = self._folder / str(call.episode)
        home.mkdir(exist_ok=True)
        os.chdir(home)
        try:
            yield
        finally:
            os.chdir(self._folder)

    def _answer(self, call: Reset | Act) -> Answer:
        if isinstance(call, Reset):
            environment = self._environments[call.episode] = self._make()
            seen = environment.reset(call.problem, call.seed)
            if not isinstance(seen, str):
                return Failure(Fault.CRASH, f"reset returned {type(seen).__name__}, not text")
            return bounded(seen)
        step = self._environments[call.episode].step(call.action)
        if not isinstance(step, Step):
            return Failure(Fault.CRASH, f"step returned {type(step).__name__}, not a Step")
        results = tuple((name, bounded(text)) for name, text in step.results)
        cut = bounded(step.observation)
        success = None if step.success is None else bool(step.success)  # numpy has a truth of its own
        return Step(cut, float(step.reward), bool(step.done), success, bool(step.valid), results, step.patch)


def bounded(text: str) -> str:
    """What leaves the environment: of a longer text the middle is left out, and its pictures stand behind the rest."""
    plain, pictures = without_pictures(text)
    return text if len(plain) <= MAX_OBSERVATION else shortened(plain, MAX_OBSERVATION) + "".join(pictures)


def shortened(text: str, most: int) -> str:
    """The text, without its middle if it has more characters than `most`."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


class _Numbers:
    """The states of the global generators of one episode."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: dict[str, Any] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the generators are the episode's."""
        outside = {name: read() for name, (read, _, _) in _generators().items()}
        for name, (_, write, seed) in _generators().items():
            if name in self._states:
                write(self._states[name])
            else:
                seed(self._seed)
        try:
            yield
        finally:
            for name, (read, write, _) in _generators().items():
                self._states[name] = read()
                if name in outside:
                    write(outside[name])


Generator = tuple[Callable[[], Any], Callable[[Any], None], Callable[[int], Any]]


def _generators() -> dict[str, Generator]:
    """The global generators that are there: how each is read, written and seeded."""
    found: dict[str, Generator] = {"random": (random.getstate, random.setstate, random.seed)}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and hasattr(numpy, "random"):
        of = numpy.random
        found["numpy"] = (of.get_state, of.set_state, lambda seed: of.seed(seed % 2**32))
    if torch is not None and hasattr(torch, "default_generator"):
        own = torch.default_generator
        found["torch"] = (own.get_state, own.set_state, own.manual_seed)
    return found
