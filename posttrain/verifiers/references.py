"""What a reference says: its number, its bare text, and whether another one says something else."""

from __future__ import annotations

import re
from fractions import Fraction

from posttrain.data.sample import Problem
from posttrain.verifiers.math_answer import final_answer
from posttrain.verifiers.math_notation import as_latex
from posttrain.verifiers.math_units import plain_number


def number(problem: Problem) -> Fraction | None:
    """The number that the reference is; None if it is none."""
    return plain_number(as_latex(_stated(problem)))


def digits(problem: Problem) -> str:
    """The reference with nothing left but what a number is written with."""
    return re.sub(r"[^0-9.\-]", "", as_latex(_stated(problem)))


def differ(one: Problem, other: Problem) -> bool:
    """Whether the answers of two problems are surely not the same."""
    numbers = number(one), number(other)
    if None not in numbers:
        return numbers[0] != numbers[1]
    return one.reference != other.reference and numbers != (None, None)


def _stated(problem: Problem) -> str:
    reference = problem.reference or ""
    stated = final_answer(reference)
    return reference if stated is None else stated.answer
