"""What a procedural task is, and what the families share: unsure facts, the answer after `#`, using up a pool."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol

from posttrain.config.schema import WeakAnnotator
from posttrain.data.sample import Message, Problem
from posttrain.verifiers.verdict import Status, Verdict

NUMBER = r"(0|[1-9][0-9]{0,11})"
"""A written number: ASCII digits, no leading zero, short enough that arithmetic on it costs nothing."""

_ANSWER = re.compile(r"\s*(-?[0-9]{1,12})(?!\w)")
_STEP = re.compile(rf"{NUMBER}([-+*/]){NUMBER}={NUMBER}")


class Task(Protocol):
    """One family of procedural problems. Levels set the difficulty; every step of a trace can be checked.

    One of pictures may also have a `check_description`: correct if the completion says what is to be seen.

    Attributes:
        name: the value of `task` in a recipe and of `meta["task"]`.
        levels: the levels it can make.
    """

    name: str
    levels: range

    def problem(self, rng: random.Random, level: int) -> Problem:
        """A problem drawn from `rng`, without id and place. `meta` holds JSON values: task, level, what checks need."""
        ...

    def split_key(self, problem: Problem) -> str:
        """The text whose hash decides between train and test; equal for problems that must not be torn apart."""
        ...

    def expert_trace(self, problem: Problem) -> str | tuple[Message, ...]:
        """A completion that `check_strict` accepts; for problems of an environment a conversation with it."""
        ...

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> str | tuple[Message, ...]:
        """A completion in the right format, with the mistakes of the simulated weak annotator."""
        ...

    def check_strict(self, problem: Problem, completion: str) -> Verdict:
        """Correct if the format is exact, every step is right and leads to the right answer."""
        ...

    def check_lenient(self, problem: Problem, completion: str) -> Verdict:
        """Correct if the number after the last `#` is the answer, whatever stands before."""
        ...


@lru_cache(maxsize=64)
def unsure_facts(unsure_share: float, fact_seed: int) -> Mapping[tuple[int, int], int]:
    """The facts "digit 0..9 + addend 1..9" that a weak annotator is unsure of, with how much too high it writes each.

    The excess is always positive (one or two), so that two mistakes in a sum never cancel: an answer is right only by
    right steps.
    """
    rng = random.Random(f"unsure facts {fact_seed}")
    facts = [(digit, addend) for digit in range(10) for addend in range(1, 10)]
    unsure = rng.sample(facts, round(unsure_share * len(facts)))
    return MappingProxyType({fact: rng.choice((1, 2)) for fact in unsure})


def excess(digit: int, addend: int, rng: random.Random, weakness: WeakAnnotator) -> int:
    """How much too high the weak annotator writes `digit + addend` this time; 0 if it writes it right."""
    wrong = unsure_facts(weakness.unsure_share, weakness.fact_seed).get((digit, addend), 0)
    return wrong if wrong and rng.random() < weakness.error_rate else 0


def check_answer(reference: str, completion: str) -> Verdict:
    """Judge the number after the last `#`, whatever stands before it."""
    _, mark, tail = completion.rpartition("#")
    if not mark:
        return Verdict(Status.NO_ANSWER, 0.0, "no '#'")
    found = _ANSWER.match(tail)
    if found is None:
        return Verdict(Status.UNPARSEABLE, 0.0, f"no number after '#': {tail[:20]!r}")
    answer = found[1]
    return Verdict(Status.CORRECT, 1.0, answer) if int(answer) == int(reference) else wrong(answer)


def wrong(detail: str) -> Verdict:
    """A judged answer that is not right."""
    return Verdict(Status.WRONG, 0.0, detail)


def unparseable(detail: str) -> Verdict:
    """An answer that does not have the task's format."""
    return Verdict(Status.UNPARSEABLE, 0.0, detail)


def calculate(left: int, operator: str, right: int) -> int | None:
    """The result on non-negative whole numbers; None where there is none (negative, or a division with a remainder)."""
    if operator == "+":
        return left + right
    if operator == "*":
        return left * right
    if operator == "-":
        return left - right if left >= right else None
    return left // right if right and left % right == 0 else None


def check_reduction(numbers: Sequence[int], target: int, trace: str, operators: str) -> Verdict:
    """Judge `a+b=c;...;#n`: each step takes two numbers from the pool and puts its result back.

    Correct if every step is right and uses numbers still in the pool, one number is left, and it is both the target
    and the answer after `#`.
    """
    *steps, answer = trace.strip().split(";", len(numbers))
    if "#" not in trace:
        return Verdict(Status.NO_ANSWER, 0.0, "no '#'")
    if not re.fullmatch("#" + NUMBER, answer):
        return unparseable(f"does not end in ';#' and a number: {answer[-20:]!r}")
    pool = list(numbers)
    for place, step in enumerate(steps, start=1):
        parts = _STEP.fullmatch(step)
        if parts is None or parts[2] not in operators:
            return unparseable(f"step {place}: {step[:30]!r}")
        left, right, result = int(parts[1]), int(parts[3]), int(parts[4])
        for number in (left, right):
            if number not in pool:
                return wrong(f"step {place}: {step}: {number} is not in the pool")
            pool.remove(number)
        if calculate(left, parts[2], right) != result:
            return wrong(f"step {place}: {step}")
        pool.append(result)
    if len(pool) > 1:
        return wrong(f"{len(pool)} numbers are left")
    if pool[0] != target or int(answer[1:]) != target:
        return wrong(f"{pool[0]} reached, {answer[1:]} answered, not {target}")
    return Verdict(Status.CORRECT, 1.0, answer[1:])
