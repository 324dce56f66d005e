"""Recorded episodes as an environment: an expert's actions are known, and what is seen behind each of them.

The policy acts with its own history. Where its action is the expert's, it sees what came then. Where it is not, the
history gets the expert's action in the place of its own (a *patch*), as often as `patches` says; the next such action
ends the episode. So long episodes can be practised without the world that they were recorded in. Source: UI-S1, arXiv
2509.11543, and its authors' code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.own_code import CodeName, OwnCode, find
from posttrain.data.episodes import Episode, read_episodes
from posttrain.data.sample import Problem
from posttrain.environments.base import Made, Step
from posttrain.environments.own_code import own
from posttrain.errors import DataError, WorldError

Grade = Callable[[str, str], float]
"""How good an action is in place of the expert's, from 0 to 1: 1 is as good as the same."""


class Recorded:
    """One episode along a recorded one.

    Args:
        episodes: of the expert; where there are several of a problem, the seed chooses.
        patches: actions other than the expert's that are replaced; None: all.
        grade: of actions.
        format_reward: part of a turn's reward that an action gets for not being empty.
    """

    class Config(EnvironmentConfig):
        """Recorded episodes of an expert, which the policy is compared with turn by turn (docs/agents.md)."""

        type: Literal["recorded"] = "recorded"
        path: str | list[str] = Field(description="files of `posttrain play --out`, of the problems of data.prompts")
        patches: int | None = Field(
            2,
            ge=0,
            description="actions other than the expert's that its own replace, before one ends the episode; null: all",
        )
        grade: CodeName | None = Field(
            None,
            description="`grades.py:grade`, as `factory`: (action, the expert's) -> 0 to 1, 1: as good; "
            "default: by words",
        )
        format_reward: float = Field(
            0.1, ge=0, lt=1, description="part of a turn's reward for an action that is not empty"
        )

        @property
        def paths(self) -> list[str]:
            """Of the files."""
            return [self.path] if isinstance(self.path, str) else self.path

        @property
        def forks(self) -> bool:
            return self.patches != 0

        @property
        def codes(self) -> list[OwnCode]:
            return [] if self.grade is None else [find(self.grade)]

        def inputs(self) -> list[str]:
            return [*self.paths, *super().inputs()]

    def __init__(
        self, episodes: Sequence[Episode], patches: int | None, grade: Grade, format_reward: float = 0.1
    ) -> None:
        self._by_problem = by_problem(episodes)
        self.patches, self.grade, self.format_reward = patches, grade, format_reward

    @classmethod
    def load(cls, config: Recorded.Config) -> Made:
        """See `environments.maker`."""
        grade = by_words if config.grade is None else own(config.grade)
        try:
            episodes = [episode for path in config.paths for episode in read_episodes(Path(path))]
        except DataError as error:
            raise WorldError(error.what, where=error.where, hint=error.hint) from error
        return Made(lambda: cls(episodes, config.patches, grade, config.format_reward))

    def reset(self, problem: Problem, seed: int) -> str:
        """What the recorded environment showed."""
        known = self._by_problem.get(problem_key(problem))
        if known is None:
            raise ValueError("there is no recorded episode of this problem")
        self._episode, self._turn, self._wrong = known[seed % len(known)], 0, 0
        return self._episode.opening

    def step(self, action: str) -> Step:
        """See `Environment.step`. Solved is what needed no patch."""
        turns, written = self._episode.turns, action.strip()
        expected, then = turns[self._turn].action, turns[self._turn].step
        assert then is not None  # `by_problem`
        grade = self.grade(written, expected.strip())
        if not 0 <= grade <= 1:
            raise ValueError(f"the grade of an action is {grade}, and not from 0 to 1")
        right = grade == 1
        reward = self.format_reward * bool(written) + (1 - self.format_reward) * grade
        self._turn += 1
        self._wrong += not right
        ended = self._turn == len(turns)
        if ended or (not right and self.patches is not None and self._wrong > self.patches):
            return Step(then.observation, reward, done=True, success=ended and not self._wrong)
        return Step(then.observation, reward, results=then.results, patch=None if right else expected)


def by_words(action: str, expected: str) -> float:
    """1 for the same words, 0.5 where the first word is the same (the kind of action), 0.1 for others, 0 for none."""
    said, wanted = action.split(), expected.split()
    if not said:
        return 0.0
    return 1.0 if said == wanted else 0.5 if wanted and said[0] == wanted[0] else 0.1


def by_problem(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    """Episodes that can be followed, by the content of their problems: up to the last action that was answered."""
    found: dict[str, list[Episode]] = {}
    for episode in episodes:
        episode.turns = [turn for turn in episode.turns if turn.step is not None]
        if episode.turns:
            found.setdefault(problem_key(episode.problem), []).append(episode)
    return found


def problem_key(problem: Problem) -> str:
    """Equal for problems with equal prompts and columns."""
    return json.dumps([problem.prompt, problem.meta], sort_keys=True)
