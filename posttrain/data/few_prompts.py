"""Many prompts of which the longest are counted: what `posttrain check` needs to know of them, in a part of the time.

Every row is rendered, and so refused as a run would refuse it. With a byte-level vocabulary a text has no more tokens
than bytes, so a text with fewer bytes than a prompt may have tokens fits, and need not be encoded to know that.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.data.bad_rows import BadRows
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem

FEW = 512
"""Prompts whose tokens are counted in any case: those with most bytes, and the first."""

UNREAD: list[int] = []
"""In place of the ids of a prompt that certainly fits."""


def few_prompts(
    problems: Sequence[Problem], renderer: Renderer, limit: int | None, bad: BadRows, name: str
) -> list[tuple[Problem, list[int]]]:
    """Prompts with their ids, or with `UNREAD` where they need not be known.

    Args:
        problems: of one source.
        renderer: with a byte-level vocabulary.
        limit: tokens of a prompt; None is no limit.
        bad: takes the rows that cannot be rendered, and a line on how many were counted.
        name: of the source.

    Raises:
        DataError: as `BadRows.made`.
    """
    rendered = bad.made(problems, lambda problem: (problem, renderer.prompt_text(problem)), name)
    most = [renderer.most_tokens(text) for _, text in rendered]
    among_longest = sorted(most)[-FEW] if len(most) > FEW else 0
    counted: list[str] = []

    def read(row: tuple[tuple[Problem, str], int]) -> tuple[Problem, list[int]]:
        (problem, text), size = row
        fits = size < among_longest and (limit is None or size <= limit)
        if counted and fits and renderer.surely_begins_well(text):
            return problem, UNREAD
        ids = renderer.encoded_prompt(text, problem)
        counted.append(problem.id)
        return problem, ids

    found = bad.made(zip(rendered, most, strict=True), read, name)
    if len(counted) < len(found):
        bad.note(name, f"tokens were counted of {len(counted):,} prompts, the longest by bytes; the others surely fit")
    return found
