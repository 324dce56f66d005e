"""What an environment is: text in, text and reward out. Knows no tokenizer and no model.

An episode is a function of (problem, seed, actions). Whoever plays the same actions again gets the same observations;
so an episode whose worker died is played up to where it was, and a run that is resumed repeats what it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Any, NamedTuple, Protocol

from posttrain.data.sample import Problem


class ActionError(Exception):
    """Raised by `Environment.step` for an action that cannot be done. The policy is told `Error: <text>`, the action
    counts as invalid, and the episode goes on. The state must be as it was."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an action led to.

    Attributes:
        observation: what the policy is told next; not shown to it once `done`.
        reward: for this action; the return of an episode is their sum.
        done: the task is over: won, lost or given up. Limits on turns and tokens are no matter of the environment.
        success: whether the task was solved; None where the return says it all. Only with `done`.
        valid: the action was understood.
        results: where the action called tools, the name of each and what it returned, of which `observation` is the
            text; each is told as a message of the role `tool`.
        patch: what the policy is shown to have done, in the place of what it did; None: that. It is trained on what it
            did, and reads this from here on.

    Raises:
        TypeError: an observation that is no text, or a reward that is no number.
        ValueError: a reward that is not finite, or a success before the end.
    """

    observation: str = ""
    reward: float = 0.0
    done: bool = False
    success: bool | None = None
    valid: bool = True
    results: tuple[tuple[str, str], ...] = ()
    patch: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.observation, str):
            raise TypeError(f"the observation is {type(self.observation).__name__}, not text")
        if not isinstance(self.reward, Real):  # numpy's numbers are
            raise TypeError(f"the reward is {type(self.reward).__name__}, not a number")
        if not math.isfinite(self.reward):
            raise ValueError(f"the reward is {self.reward}")
        if self.success is not None and not self.done:
            raise ValueError("success is known when the episode is done")


class Environment(Protocol):
    """One episode; a new instance is made for each."""

    def reset(self, problem: Problem, seed: int) -> str:
        """Begin, and say what is to be seen: it is put behind the problem's prompt, as a paragraph of its own. The
        empty text adds nothing.

        Args:
            problem: of the episode; its columns are in `meta`.
            seed: of everything that the environment draws. Equal in all episodes of a group.
        """
        ...

    def step(self, action: str) -> Step:
        """Do what the policy says.

        Args:
            action: the text of one turn, special tokens removed.

        Raises:
            ActionError: it cannot be done.
        """
        ...


class Made(NamedTuple):
    """A loaded environment.

    Attributes:
        make: makes a fresh instance for each episode.
        tools: JSON descriptions of what the policy may call, for the chat template.
    """

    make: Callable[[], Environment]
    tools: tuple[dict[str, Any], ...] = ()


class Fault(StrEnum):
    """Why an episode says nothing of the policy. It has no return, and is no failure of the policy's."""

    CRASH = "crash"
    TIMEOUT = "timeout"
    DIVERGED = "diverged"


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of an episode that its environment did not survive.

    Attributes:
        fault: what happened.
        detail: in a line, for people.
    """

    fault: Fault
    detail: str
