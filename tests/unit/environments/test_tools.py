"""Tools that the policy calls: functions, and classes as TRL takes them."""

from __future__ import annotations

import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from posttrain.data.sample import Problem
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.tools import Tools
from posttrain.errors import WorldError

RECIPES = Path(__file__).parents[3] / "recipes" / "agents"
SOURCE = '''
    import asyncio


    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first.
            b: the second.
        """
        return a + b


    def untyped(a):
        """Nothing is known of a."""


    class Counter:
        """As a user of TRL writes it."""

        @property
        def expensive(self):
            raise RuntimeError("nobody asked for this")

        def reset(self, start=0, **row):
            self.n, self.goal, self.row = int(start), int(row["goal"]), row
            return f"The counter is {self.n}."

        def increment(self, by: int) -> str:
            """Add to the counter.

            Args:
                by: how much to add.
            """
            if by > 5:
                raise ValueError("at most 5")
            self.n += by
            return f"now {self.n}"

        async def wait(self) -> str:
            """Wait a little."""
            await asyncio.sleep(0)
            return "waited"

        def _hidden(self) -> str:
            """No tool."""

        def get_reward(self) -> float:
            return 1.0 if self.n == self.goal else 0.0
'''
PROBLEM = Problem("p/0", "Count.", meta={"start": 1, "goal": 4})


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tools.py").write_text(textwrap.dedent(SOURCE))

    def make(functions=(), factory=None, **more):
        named = [f"{tmp_path / 'tools.py'}:{name}" for name in functions]
        factory = factory and f"{tmp_path / 'tools.py'}:{factory}"
        return Tools.Config(functions=named, factory=factory, workers=0, **more)

    return make


def call(name: str, **arguments) -> str:
    written = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{written}}}}}\n</tool_call>'


def played(settings, *actions):
    with closing(EnvironmentPool(settings)) as pool:
        opened = pool.reset({0: (PROBLEM, 3)})[0]
        return pool.tools, opened, [pool.step({0: action})[0] for action in actions]


def test_a_class_of_trls_form(config):
    tools, opened, steps = played(
        config(["add"], "Counter"),
        call("increment", by=9),
        "I try another tool. " + call("incremnt", by=1),
        call("increment", by=2) + call("wait") + call("add", a=1, b=2),
        call("increment"),
        call("increment", by=1),
        "The counter is at its goal.",
    )
    assert [tool["function"]["name"] for tool in tools] == ["add", "increment", "wait"]
    assert tools[1]["function"]["parameters"]["required"] == ["by"] and opened == "The counter is 1."
    assert [step.results for step in steps] == [
        (("increment", "Error: ValueError: at most 5"),),
        (("incremnt", "Error: unknown tool 'incremnt'; did you mean 'increment'?"),),
        (("increment", "now 3"), ("wait", "waited"), ("add", "3")),
        (("increment", "Error: TypeError: Counter.increment() missing 1 required positional argument: 'by'"),),
        (("increment", "now 4"),),
        (),
    ]
    assert [step.valid for step in steps] == [False, False, True, False, True, True]
    assert [step.reward for step in steps] == [0, 0, 0, 0, 0, 1.0] and [step.done for step in steps] == [False] * 5 + [
        True
    ]


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("<tool_call>{}", "<tool_call> without </tool_call>"),
        ("<tool_call>add(1, 2)</tool_call>", "Expecting value"),
        ("<tool_call>[1]</tool_call>", "it is no {"),
        ('<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', "the arguments of add are no object"),
    ],
)
def test_a_call_that_cannot_be_read_is_answered_and_not_done(config, action, reason):
    (step,) = played(config(["add"]), action)[2]
    assert step.observation.startswith("Error: this is no tool call: ") and reason in step.observation
    assert not step.valid and not step.done


def test_calls_as_one_object(config):
    settings = config(["add"], calls="json")
    first, last = played(settings, ' {"name": "add", "parameters": {"a": 2, "b": 3}}', "It is 5.")[2]
    assert first.results == (("add", "5"),) and last.done and last.reward == 0


def test_an_episode_may_end_by_itself():
    class Bomb:
        done = False

        def reset(self):
            return None

        def cut(self):
            """Cut a wire."""
            self.done = True

        def get_reward(self):
            return 0.5

    tools = Tools([], Bomb(), "hermes")
    step = tools.step(call("cut"))
    assert step.done and step.reward == 0.5 and step.results == (("cut", "None"),)


def test_a_tool_without_types_is_a_users_mistake(config):
    with pytest.raises(WorldError, match="untyped"):
        played(config(["untyped"]))
    with pytest.raises(ValueError, match="functions"):
        Tools.Config()


def test_the_tools_of_the_recipe_for_word_problems():
    names = ["calculator.py:calculate", "search.py:search"]
    settings = Tools.Config(functions=[f"{RECIPES}/{name}" for name in names], workers=0)
    tools, _, steps = played(
        settings,
        call("calculate", expression='"(12 + 3) * 4 / 8"') + call("search", query='"how many days has a leap year?"'),
        call("calculate", expression="\"__import__('os')\""),
        call("search", query='"zzz"'),
        r"It has \boxed{366} days.",
    )
    assert [tool["function"]["name"] for tool in tools] == ["calculate", "search"]
    (_, worked_out), (_, found) = steps[0].results
    assert worked_out == "7.5" and "29 in a leap year" in found and found.count("\n") == 1
    assert [step.valid for step in steps] == [True, False, False, True] and steps[-1].done
