"""Rooms: a text world with a key, a chest and a map that nobody sees. Few words, levels, no download.

Level = number of rooms, 2 to 9: a random tree on a 3 x 3 grid, with shuffled names. Only the room one stands in is
seen, so where one has been must be remembered. `go <direction>`, `take key` and `open chest` are the actions; any other
one changes nothing and is answered with `no`. Who opens the chest with the key has solved it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol

from pydantic import Field

from posttrain.config.environment import EnvironmentConfig
from posttrain.data.sample import Problem
from posttrain.environments.base import Made, Step

NAMES = ("hall", "attic", "cellar", "garden", "kitchen", "study", "tower", "vault", "porch")
DIRECTIONS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}
LEVELS = range(2, 10)

TURNS = 12
"""In which the agents of this file play."""

SHAPED = 0.2
"""Reward for the key, with `shaped`; the chest then gives the rest of 1."""

Cell = tuple[int, int]


class Rooms:
    """The world that `problem.meta` names by `level` and `world`. The seed decides about noise alone.

    Args:
        noise: probability that a step through a door leads nowhere.
        crash: probability that an action raises an exception.
        hang: probability that an action never ends.
        shaped: give a part of the reward for the key.
    """

    class Config(EnvironmentConfig):
        """The test bed: a map to explore, a key to find and a chest to open. Problems:
        `data: {prompts: {task: rooms}}`."""

        type: Literal["rooms"] = "rooms"
        noise: float = Field(0.0, ge=0, lt=1, description="probability that a step through a door leads nowhere")
        crash: float = Field(0.0, ge=0, lt=1, description="probability that an action raises an exception, for tests")
        hang: float = Field(0.0, ge=0, lt=1, description="probability that an action never ends, for tests")
        shaped: bool = Field(False, description="give a part of the reward for the key")

    def __init__(self, noise: float = 0.0, crash: float = 0.0, hang: float = 0.0, shaped: bool = False) -> None:
        self.noise, self.crash, self.hang, self.shaped = noise, crash, hang, shaped

    @classmethod
    def load(cls, config: Rooms.Config) -> Made:
        """See `environments.maker`."""
        options = config.model_dump(include={"noise", "crash", "hang", "shaped"})
        return Made(lambda: cls(**options))

    def reset(self, problem: Problem, seed: int) -> str:
        """Nothing is added to the prompt, which says what is seen at first."""
        self._draw = random.Random(seed)
        self._build(problem.meta["level"], problem.meta["world"])
        return ""

    def _build(self, level: int, world: int) -> None:
        draw = random.Random(f"rooms {level} {world}")
        cells: list[Cell] = [(0, 0)]
        self._doors: dict[Cell, dict[str, Cell]] = {(0, 0): {}}
        while len(cells) < level:
            here, way = draw.choice(cells), draw.choice(list(DIRECTIONS))
            there = _beyond(here, way)
            if max(map(abs, there)) > 1 or there in self._doors:
                continue
            cells.append(there)
            self._doors[there] = {BACK[way]: here}
            self._doors[here][way] = there
        self._names = dict(zip(cells, draw.sample(NAMES, len(NAMES)), strict=False))
        self._at, self._has_key = draw.choice(cells), False
        self._key = draw.choice(cells)
        self._chest = draw.choice([cell for cell in cells if cell != self._at])

    def look(self, note: str = "") -> str:
        """What is seen: a word on the last action, the room, its doors, and what lies there."""
        doors = [way for way in DIRECTIONS if way in self._doors[self._at]]
        things = ["key"] if self._key == self._at and not self._has_key else []
        things += ["chest"] if self._chest == self._at else []
        words = [note, "."] if note else []
        return " ".join([*words, self._names[self._at], "exits", *doors, *(["see", *things] if things else [])])

    def step(self, action: str) -> Step:
        """See `Environment.step`."""
        if self._draw.random() < self.crash:
            raise RuntimeError("the floor gives way")
        if self._draw.random() < self.hang:
            time.sleep(1e6)
        words = action.split()
        if len(words) == 2 and words[0] == "go" and words[1] in self._doors[self._at]:
            if self._draw.random() < self.noise:
                return Step(self.look("no"))
            self._at = self._doors[self._at][words[1]]
            return Step(self.look())
        if words == ["take", "key"] and self._key == self._at and not self._has_key:
            self._has_key = True
            return Step(self.look("taken"), reward=SHAPED if self.shaped else 0.0)
        if words == ["open", "chest"] and self._chest == self._at:
            if not self._has_key:
                return Step(self.look("locked"))
            return Step(self.look("opened"), reward=1.0 - (SHAPED if self.shaped else 0.0), done=True, success=True)
        return Step(self.look("no"), valid=False)


class Agent(Protocol):
    """Acts on what it sees, from the first observation on."""

    def act(self, observation: str) -> str: ...


class Expert:
    """Explores depth first, remembers what it has seen, and goes straight to key and chest once it knows them."""

    def __init__(self) -> None:
        self._map: dict[Cell, list[str]] = {}
        self._at: Cell = (0, 0)
        self._key: Cell | None = None
        self._chest: Cell | None = None
        self._has_key = False

    def act(self, observation: str) -> str:
        """The next action."""
        words = observation.split()
        self._map[self._at] = [way for way in DIRECTIONS if way in words]
        if "key" in words:
            self._key = self._at
        if "chest" in words:
            self._chest = self._at
        if not self._has_key and self._key == self._at:
            self._has_key = True
            return "take key"
        if self._has_key and self._chest == self._at:
            return "open chest"
        target = self._chest if self._has_key else self._key
        way = self._towards(lambda cell: cell not in self._map if target is None else cell == target)
        self._at = _beyond(self._at, way)
        return f"go {way}"

    def _towards(self, wanted: Callable[[Cell], bool]) -> str:
        """The first direction of a shortest way to such a room; any door where all rooms are known and none is it."""
        waiting: deque[tuple[Cell, str]] = deque([(self._at, "")])
        seen = {self._at}
        while waiting:
            cell, first = waiting.popleft()
            if first and wanted(cell):
                return first
            for way in self._map.get(cell, ()):
                there = _beyond(cell, way)
                if there not in seen:
                    seen.add(there)
                    waiting.append((there, first or way))
        return self._map[self._at][0]


class Weak:
    """Wanders without memory, and often passes by what it sees.

    Args:
        draw: decides.
        careless: probability to pass by a key, or a chest that has not just been found locked.
    """

    def __init__(self, draw: random.Random, careless: float) -> None:
        self._draw, self._careless = draw, careless

    def act(self, observation: str) -> str:
        """The next action."""
        words = observation.split()
        if "key" in words and self._draw.random() >= self._careless:
            return "take key"
        if "chest" in words and words[0] != "locked" and self._draw.random() >= self._careless:
            return "open chest"
        return "go " + self._draw.choice([way for way in DIRECTIONS if way in words])


def play(problem: Problem, agent: Agent, turns: int = TURNS) -> tuple[list[tuple[str, Step]], bool]:
    """Actions with what they led to, and whether the chest was opened. Without noise."""
    taken: list[tuple[str, Step]] = []
    world, seen = Rooms(), str(problem.prompt)
    world.reset(problem, seed=0)
    while len(taken) < turns and not (taken and taken[-1][1].done):
        action = agent.act(seen)
        taken.append((action, world.step(action)))
        seen = taken[-1][1].observation
    return taken, bool(taken[-1][1].success)


def first_look(level: int, world: int) -> str:
    """What is seen at first in this world."""
    rooms = Rooms()
    rooms.reset(Problem("", "", meta={"level": level, "world": world}), seed=0)
    return rooms.look()


def _beyond(cell: Cell, way: str) -> Cell:
    right, up = DIRECTIONS[way]
    return cell[0] + right, cell[1] + up
