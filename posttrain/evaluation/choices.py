"""Multiple-choice problems out of a right and several wrong answers: shuffled, lettered, written under the prompt."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import replace

from posttrain.data.sample import Problem
from posttrain.errors import DataError, nearest

INSTRUCTION = "Please reason step by step, and put the letter of the right option within \\boxed{}."


def with_options(problem: Problem, columns: Sequence[str]) -> Problem:
    """The problem with its options: `meta["choices"]` has their texts in order, the reference becomes the letter.

    The order is shuffled by a hash of prompt and options, so that it is the same in every run and on every machine.

    Args:
        problem: with the right answer as reference and a text prompt.
        columns: with the wrong ones.

    Raises:
        DataError: a missing column, no reference, two equal options, or a prompt that is chat messages.
    """
    if not isinstance(problem.prompt, str) or problem.reference is None:
        missing = "no reference" if problem.reference is None else "chat messages as its prompt"
        raise DataError(f"options need a text prompt and a reference, this problem has {missing}", where=problem.where)
    options = [problem.reference.strip()]
    for column in columns:
        if not isinstance(problem.meta.get(column), str):
            raise DataError(f"no text in column {column!r}", where=problem.where, hint=nearest(column, problem.meta))
        options.append(problem.meta[column].strip())
    if len(set(options)) < len(options):
        raise DataError("two options are equal", where=problem.where)
    key = problem.prompt + "\n".join(options)
    shuffled = sorted(options, key=lambda option: hashlib.sha256(f"{key}\n{option}".encode()).digest())
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, shuffled, strict=False)]
    return replace(
        problem,
        prompt="\n".join([problem.prompt, "", *lines, "", INSTRUCTION]),
        reference=string.ascii_uppercase[shuffled.index(options[0])],
        meta={**problem.meta, "choices": shuffled},
    )
