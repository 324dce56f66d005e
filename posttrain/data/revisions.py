"""The problem of improving on an earlier answer."""

from __future__ import annotations

from dataclasses import replace

from posttrain.config.revisions import filled
from posttrain.data.sample import Message, Problem
from posttrain.errors import DataError


def revision(problem: Problem, answer: str | tuple[Message, ...], template: str) -> Problem:
    """The problem whose prompt holds the earlier answer; in a chat the template replaces the last user message.

    Args:
        problem: as it was asked.
        answer: text, or one message.
        template: with `{prompt}` and `{answer}`.

    Raises:
        DataError: the answer has several turns, or the prompt does not end with a user message.
    """
    text = _single_turn(answer, problem.where)
    if isinstance(problem.prompt, str):
        return replace(problem, prompt=filled(template, problem.prompt, text))
    *before, last = problem.prompt
    if last["role"] != "user":
        raise DataError(
            f"a prompt to be revised must end with the user's message, not {last['role']}'s", where=problem.where
        )
    return replace(problem, prompt=(*before, {**last, "content": filled(template, last["content"], text)}))


def _single_turn(answer: str | tuple[Message, ...], where: str) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) != 1:
        raise DataError(f"an answer of {len(answer)} messages cannot be put into the revision prompt", where=where)
    return answer[0]["content"]
