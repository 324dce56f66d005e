"""Principles of a prompt: which of them, negated or not, what a judge of them reads, and which response they favour.

SALMON, arXiv 2310.05910, as its authors' code has it: positive definitions and negative ones, a number of principles
that falls off geometrically, and the word of the one that is most sure.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from posttrain.config.principles import PLACEHOLDER, Principle
from posttrain.data.sample import Problem
from posttrain.errors import DataError

Drawn = dict[str, bool]
"""Names of principles in the order in which they are read -> whether each is negated."""


def draw_principles(names: Sequence[str], number: int | float, negated: float, key: str) -> Drawn:
    """Some of the principles, in random order, as a function of the key alone.

    Args:
        names: of all of them.
        number: how many; a float p for a geometric number, drawn anew where it is larger than that of all.
        negated: probability that one is negated.
        key: seed and place.
    """
    chance = random.Random(key)  # nosec B311 # no secret
    if isinstance(number, float):
        p, number = number, len(names) + 1
        while number > len(names):
            number = 1
            while chance.random() >= p and number <= len(names):
                number += 1
    return {name: chance.random() < negated for name in chance.sample(list(names), number)}


def surest(scores: Mapping[str, Sequence[float]], variances: Mapping[str, float], drawn: Drawn) -> float:
    """Of the principles that were drawn, the score that is largest in size: above 0 it favours the first response.

    The score of a principle is the mean of its two scores, of either order of the responses, over their variance in the
    data (not its root). It is 0 where the two orders differ in sign, and turned where the principle is negated.

    Args:
        scores: name -> the score of the first response over the second, with the first shown first and second.
        variances: name -> variance of such scores.
    """
    found = 0.0
    for name, negative in drawn.items():
        one, other = scores[name]
        score = 0.0 if one * other <= 0 else (one + other) / 2 / variances[name]
        score = -score if negative else score
        found = score if abs(score) > abs(found) else found
    return found


def scores_of(problem: Problem, column: str, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The scores of a row by principle: two numbers each.

    Raises:
        DataError: no such column, a principle is not there, or has no two finite numbers.
    """
    found, where = problem.meta.get(column), f"{problem.where}, column {column!r}"
    if not isinstance(found, Mapping):
        raise DataError(
            f"no scores by principle in column {column!r}",
            where=problem.where,
            hint='expected {"helpful": [1.2, 0.8], ...}: of chosen over rejected, with each of them shown first',
        )
    scores: dict[str, tuple[float, float]] = {}
    for name in names:
        pair = found.get(name)
        numbers = list(pair) if isinstance(pair, list | tuple) else []
        if len(numbers) != 2 or not all(map(_is_number, numbers)):
            raise DataError(f"principle {name!r} needs two finite numbers, got {pair!r}", where=where)
        scores[name] = (float(numbers[0]), float(numbers[1]))
    return scores


def variances_of(rows: Sequence[Mapping[str, Sequence[float]]], names: Sequence[str]) -> dict[str, float]:
    """The variance of each principle's scores, both orders together; 1 where they are all the same."""
    found = {}
    for name in names:
        values = [value for row in rows for value in row[name]]
        mean = math.fsum(values) / len(values)
        found[name] = math.fsum((value - mean) ** 2 for value in values) / len(values) or 1.0
    return found


def with_principles(problem: Problem, principles: Mapping[str, Principle], drawn: Drawn, template: str) -> Problem:
    """The problem as a judge by these principles reads it; in a chat the template replaces the last user message.

    Raises:
        DataError: the prompt does not end with a user message.
    """
    lines = [principles[name].negative if negative else principles[name].text for name, negative in drawn.items()]
    values = {"principles": "\n".join(lines)}

    def filled(prompt: str) -> str:
        return PLACEHOLDER.sub(lambda match: (values | {"prompt": prompt})[match[1]], template)

    if isinstance(problem.prompt, str):
        return replace(problem, prompt=filled(problem.prompt))
    *before, last = problem.prompt
    if last["role"] != "user":
        what = f"a prompt with principles must end with the user's message, not {last['role']}'s"
        raise DataError(what, where=problem.where)
    return replace(problem, prompt=(*before, {**last, "content": filled(last["content"])}))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
