"""Calls of tools that a policy writes: what cannot be read is its own fault, and costs it the turn.

An episode that the environment fails in is left out of the advantages, so such a call would escape the penalty.
"""

from __future__ import annotations

import time

import pytest

from posttrain.data.sample import Problem
from posttrain.environments.base import Step
from posttrain.environments.host import Act, EnvironmentHost, Reset
from posttrain.environments.tools import Tools

MANY = 30_000


def search(query: str) -> str:
    """Look something up.

    Args:
        query: what.
    """
    return query


CALLS = {
    "brackets": "[" * MANY,
    "closed brackets": '{"name": "search", "arguments": {"query": ' + "[" * MANY + "]" * MANY + "}}",
    "objects": '{"a": ' * MANY,
    "a long number": '{"name": "search", "arguments": {"query": ' + "9" * MANY + "}}",
    "half a character": '{"name": "\\ud800"}',
    "a long name": '{"name": "' + "search " * MANY + '"}',
    "another's argument": '{"name": "search", "arguments": {"self": 1}}',
    "an attribute": '{"name": "__class__", "arguments": {}}',
}
"""In either form."""

TEXTS = [(form, text) for text in CALLS.values() for form in ("hermes", "json") if form == "hermes" or text[0] == "{"]
TEXTS = [(form, f"<tool_call>{text}</tool_call>" if form == "hermes" else text) for form, text in TEXTS]
TEXTS += [("hermes", "<tool_call>" * MANY), ("hermes", "</tool_call>" * MANY + "<tool_call>" * MANY)]


@pytest.mark.parametrize(("form", "text"), TEXTS)
def test_no_call_makes_the_environment_fail(form: str, text: str) -> None:
    """Nested ones did, as crashes; and many beginnings without an end took half a minute, as a hang."""
    host = EnvironmentHost(lambda: Tools([search], None, form))
    host.call(Reset(0, Problem("p", "q"), 0))
    started = time.process_time()
    found = host.call(Act(0, text))
    assert isinstance(found, Step) and not found.valid and found.observation.startswith("Error: "), found
    assert time.process_time() - started < 2
