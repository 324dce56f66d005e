"""Environments in processes: what hangs, dies, forks or draws costs its own episode and no other."""

from __future__ import annotations

import json
import random
import textwrap
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from posttrain.data.sample import Problem
from posttrain.environments.base import Failure, Step
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.python import PythonEnvironment
from posttrain.errors import WorldError

SOURCE = """
    import os, random, signal, sys, time

    import numpy

    from posttrain.environments.base import ActionError, Step


    class World:
        calls = 0

        def __init__(self, fragile=False):
            self.fragile = fragile

        def reset(self, problem, seed):
            self.count, self.name = 0, problem.prompt
            return f"{self.name} {random.random():.6f} {numpy.random.random():.6f}"

        def step(self, action):
            World.calls += 1
            self.count += 1
            if action == "hang":
                time.sleep(1000)
            if action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if action == "die once" and not os.path.exists(self.name):
                open(self.name, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if action == "fork":
                os.fork()
            if action == "raise":
                raise ValueError("no such thing")
            if action == "refuse":
                raise ActionError("not now")
            if action == "much":
                return Step("x" * 1_000_000)
            if action == "text":
                return "text"
            if action == "numpy":
                return Step("end", numpy.float32(0.5), numpy.bool_(True), numpy.bool_(True))
            if action == "leak":
                return Step(f"call {World.calls}")
            return Step(f"{self.name} {self.count} {random.random():.6f} {numpy.random.random():.6f}")


    class NoWorld:
        def reset(self, problem, seed):
            return ""
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "world.py").write_text(textwrap.dedent(SOURCE))

    def make(workers=1, name="World", **more):
        given = {"step_seconds": 1.0, "workers": workers} | more
        return PythonEnvironment.Config(factory=f"{tmp_path / 'world.py'}:{name}", **given)

    return make


def starts(*names):
    return {number: (Problem(name, name), 7) for number, name in enumerate(names)}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_episode_is_a_function_of_problem_seed_and_actions(config, workers):
    """Alone, side by side, here or in a process: the global random numbers are the episode's own."""
    random.seed(3)
    np.random.seed(3)
    outside = random.getstate(), np.random.get_state()[1].tolist()
    seen = []
    for names in (("a",), ("a", "b", "c")):
        with closing(EnvironmentPool(config(workers))) as pool:
            opened = pool.reset(starts(*names))
            steps = [pool.step({number: "look" for number in opened})[0] for _ in range(3)]
            seen.append([opened[0], *steps])
    assert seen[0] == seen[1] and len({step.observation for step in seen[0][1:]}) == 3
    assert (random.getstate(), np.random.get_state()[1].tolist()) == outside


def test_processes_give_what_this_one_gives(config):
    found = []
    for workers in (0, 2):
        with closing(EnvironmentPool(config(workers))) as pool:
            opened = pool.reset(starts("a", "b", "c"))
            found.append([opened, pool.step(dict.fromkeys(opened, "look")), pool.step(dict.fromkeys(opened, "look"))])
    assert found[0] == found[1]


@pytest.mark.parametrize(("action", "fault", "detail"), [("hang", "timeout", "1 s"), ("die", "crash", "died")])
def test_who_hangs_or_dies_costs_its_own_episode_after_a_second_chance(config, action, fault, detail):
    with closing(EnvironmentPool(config(1))) as pool, closing(EnvironmentPool(config(1))) as quiet:
        for each in (pool, quiet):
            each.reset(starts("a", "b", "c"))
            each.step(dict.fromkeys(range(3), "look"))
        steps = pool.step({0: "look", 1: action, 2: "look"})
        expected = quiet.step({0: "look", 2: "look"})
        assert isinstance(steps[1], Failure) and steps[1].fault == fault and detail in steps[1].detail
        assert (steps[0], steps[2]) == (expected[0], expected[2])
        assert pool.restarts == 2
        # The neighbours were played again in a new process, and go on as if nothing had been.
        assert pool.step({0: "look", 2: "look"}) == quiet.step({0: "look", 2: "look"})


def test_who_dies_once_goes_on(config, tmp_path):
    name = str(tmp_path / "died")
    with closing(EnvironmentPool(config(1))) as pool:
        pool.reset(starts("a", name))
        pool.step({0: "look", 1: "look"})
        steps = pool.step({0: "look", 1: "die once"})
        assert all(isinstance(step, Step) for step in steps.values()) and pool.restarts == 1
        assert steps[1].observation.startswith(f"{name} 2 ")


def test_what_an_environment_raises_and_returns(config, tmp_path):
    log = tmp_path / "environment.log"
    with closing(EnvironmentPool(config(1), log)) as pool:
        pool.reset(starts("a", "b", "c", "d", "e"))
        steps = pool.step({0: "raise", 1: "refuse", 2: "much", 3: "text", 4: "fork"})
        assert steps[0] == Failure("crash", "ValueError: no such thing (world.py, line 32)")
        assert steps[1] == Step("Error: not now", valid=False)
        assert len(steps[2].observation) < 110_000 and "900,000 characters left out" in steps[2].observation
        assert isinstance(steps[3], Failure) and "str, not a Step" in steps[3].detail
        assert steps[4].observation.startswith("e 1 ")
        assert pool.step({1: "look", 4: "look"}).keys() == {1, 4}
        assert pool.restarts == 0
    assert "no such thing" in log.read_text()


def test_one_that_answers_otherwise_when_played_again_has_diverged(config):
    with closing(EnvironmentPool(config(1))) as pool:
        pool.reset(starts("a", "b", "c"))
        pool.step({0: "look", 1: "leak", 2: "look"})
        pool.step({0: "look", 1: "leak", 2: "look"})
        steps = pool.step({0: "die", 1: "look", 2: "look"})
        assert steps[0].fault == "crash" and steps[1].fault == "diverged" and "call" in steps[1].detail
        assert steps[2].observation.startswith("c 3 ")


def test_code_that_cannot_be_loaded_is_a_users_mistake(config, tmp_path):
    with (
        closing(EnvironmentPool(config(1, "NoWorld"))) as pool,
        pytest.raises(WorldError, match="without a method"),
    ):
        pool.start()
    with closing(EnvironmentPool(config(0, options={"colour": "red"}))) as pool, pytest.raises(WorldError) as wrong:
        pool.start()
    assert "colour" in wrong.value.what and wrong.value.where.endswith("world.py:World")
    with pytest.raises(ValueError, match="defines no 'Wrld'"):
        config(1, "Wrld")


def test_numbers_of_numpy_are_numbers(config):
    with closing(EnvironmentPool(config(0))) as pool:
        pool.reset(starts("a"))
        step = pool.step({0: "numpy"})[0]
    assert step == Step("end", 0.5, done=True, success=True) and json.dumps([step.reward, step.done, step.success])


def test_the_example_of_the_page(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")
    (tmp_path / "shop.py").write_text(page.split("```python\n")[1].split("```")[0])
    settings = PythonEnvironment.Config(factory=f"{tmp_path / 'shop.py'}:Shop", workers=0)
    with closing(EnvironmentPool(settings)) as pool:
        assert pool.reset({0: (Problem("p", "Shop.", meta={"money": 5}), 1)})[0] == "You have 5 coins."
        steps = [pool.step({0: action})[0] for action in ("hello", "buy bread", "buy milk")]
    assert steps == [
        Step("Error: say: buy <thing>", valid=False),
        Step("2 coins left."),
        Step("-1 coins left.", reward=1.0, done=True, success=True),
    ]
