"""Rooms, level n = number of rooms: worlds of the environment of that name, and how its agents play them."""

from __future__ import annotations

import random

from posttrain.config.schema import WeakAnnotator
from posttrain.data.sample import Message, Problem
from posttrain.data.tasks.base import wrong
from posttrain.environments.rooms import LEVELS, Agent, Expert, Rooms, Weak, first_look, play
from posttrain.verifiers.verdict import Status, Verdict


class RoomsTask:
    """Problems for `environment: {type: rooms}`. The prompt is what is seen first; traces are conversations.

    The weak annotator wanders without memory and passes by a key or chest with probability `weakness.unsure_share`.
    Not every trace succeeds: both play for a number of turns.

    The checks are for answers that name all actions ahead, one in a line: they are played.
    """

    name = "rooms"
    levels = LEVELS

    def problem(self, rng: random.Random, level: int) -> Problem:
        world = rng.getrandbits(32)
        meta = {"task": self.name, "level": level, "world": world}
        return Problem(id="", prompt=first_look(level, world), meta=meta)

    def split_key(self, problem: Problem) -> str:
        return f"{problem.meta['level']} {problem.meta['world']}"

    def expert_trace(self, problem: Problem) -> tuple[Message, ...]:
        return _conversation(problem, Expert())

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> tuple[Message, ...]:
        return _conversation(problem, Weak(rng, weakness.unsure_share))

    def check_strict(self, problem: Problem, completion: str) -> Verdict:
        world = Rooms()
        world.reset(problem, seed=0)
        for action in completion.splitlines():
            step = world.step(action)
            if step.done:
                return Verdict(Status.CORRECT, 1.0, step.observation)
        return wrong("the chest is not open")

    def check_lenient(self, problem: Problem, completion: str) -> Verdict:
        return self.check_strict(problem, completion)


def _conversation(problem: Problem, agent: Agent) -> tuple[Message, ...]:
    """Actions and observations in turn, from the first action to the last."""
    messages: list[Message] = []
    for action, step in play(problem, agent)[0]:
        messages += [{"role": "assistant", "content": action}, {"role": "user", "content": step.observation}]
    return tuple(messages[:-1])


TASK = RoomsTask()
