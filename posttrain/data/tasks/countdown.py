"""Countdown, level n = how many numbers: `8 3 25:49=` is answered by `8*3=24;24+25=49;#49`."""

from __future__ import annotations

import random

from posttrain.config.schema import WeakAnnotator
from posttrain.data.sample import Problem
from posttrain.data.tasks.base import calculate, check_answer, check_reduction
from posttrain.verifiers.verdict import Verdict

OPERATORS = "+-*/"
LARGEST_NUMBER, LARGEST_TARGET, LARGEST_RESULT = 25, 99, 999
MAX_ATTEMPTS = 8
"""Failed attempts in a weak trace; after that many the annotator is shown a solution, so that traces stay short."""


class Countdown:
    """Reach the target with every number used once. Steps stay with non-negative whole numbers; divisions are exact.

    A trace may be a series of attempts separated by `|`; only the last one ends in `#` and only it is checked. The
    lenient check reads nothing but the number after `#`, which the prompt gives away: use it to see the difference to
    the strict one, not as a reward.

    The weak annotator combines numbers at random and sees a solution only when two numbers are left. After each
    failed attempt it stops there with probability `give_up_rate`. Its facts are right.
    """

    name = "countdown"
    levels = range(2, 7)

    def problem(self, rng: random.Random, level: int) -> Problem:
        while True:
            numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(level)]
            pool, solution = list(numbers), []
            while len(pool) > 1:
                solution.append(_random_step(pool, rng))
            if pool[0] <= LARGEST_TARGET:
                break
        return Problem(
            id="",
            prompt=" ".join(map(str, numbers)) + f":{pool[0]}=",
            reference=str(pool[0]),
            meta={"task": self.name, "level": level, "numbers": numbers, "target": pool[0], "solution": solution},
        )

    def split_key(self, problem: Problem) -> str:
        # The order of the numbers does not change the problem, so no permutation of a train problem is in test.
        return f"{sorted(problem.meta['numbers'])}:{problem.meta['target']}"

    def expert_trace(self, problem: Problem) -> str:
        return _written(problem.meta["solution"], problem.meta["target"])

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> str:
        failed: list[str] = []
        for _ in range(MAX_ATTEMPTS):
            steps, result = _attempt(problem.meta["numbers"], problem.meta["target"], rng)
            if result == problem.meta["target"] or rng.random() < weakness.give_up_rate:
                return "|".join([*failed, _written(steps, result)])
            failed.append(";".join(steps))
        return "|".join([*failed, self.expert_trace(problem)])

    def check_strict(self, problem: Problem, completion: str) -> Verdict:
        last = completion.rpartition("|")[2]
        return check_reduction(problem.meta["numbers"], problem.meta["target"], last, OPERATORS)

    def check_lenient(self, problem: Problem, completion: str) -> Verdict:
        return check_answer(str(problem.meta["target"]), completion)


def _written(steps: list[str], result: int) -> str:
    return ";".join([*steps, f"#{result}"])


def _options(left: int, right: int) -> list[tuple[str, int]]:
    """(step, result) for all operations on two numbers that give a positive result in range."""
    large, small = max(left, right), min(left, right)
    pairs = {"+": (left, right), "*": (left, right), "-": (large, small), "/": (large, small)}
    options = [(f"{a}{operator}{b}=", calculate(a, operator, b)) for operator, (a, b) in pairs.items()]
    return [(f"{step}{result}", result) for step, result in options if result and result <= LARGEST_RESULT]


def _random_step(pool: list[int], rng: random.Random) -> str:
    """Take two numbers from the pool, put the result of a random operation back, and return the step."""
    left, right = (pool.pop(rng.randrange(len(pool))) for _ in range(2))
    step, result = rng.choice(_options(left, right))
    pool.append(result)
    return step


def _attempt(numbers: list[int], target: int, rng: random.Random) -> tuple[list[str], int]:
    pool, steps = list(numbers), []
    while len(pool) > 2:
        steps.append(_random_step(pool, rng))
    options = _options(*pool)
    step, result = rng.choice([option for option in options if option[1] == target] or options)
    return [*steps, step], result


TASK = Countdown()
