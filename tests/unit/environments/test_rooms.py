"""The world of rooms and its agents, and what a step may say."""

from __future__ import annotations

import random

import pytest

from posttrain.config.schema import TaskSource, WeakAnnotator
from posttrain.data.sample import Problem
from posttrain.data.tasks import TASKS, generate_examples, generate_problems
from posttrain.environments.base import Step
from posttrain.environments.rooms import LEVELS, Expert, Rooms, Weak, play

PROBLEM = Problem("p", "porch exits north", meta={"level": 3, "world": 0})


def world(**options) -> Rooms:
    rooms = Rooms(**options)
    rooms.reset(PROBLEM, seed=5)
    return rooms


def solved(problem: Problem) -> list[tuple[str, Step]]:
    return play(problem, Expert(), turns=40)[0]


@pytest.mark.parametrize("reward", ["it is a number", float("nan"), float("inf"), None])
def test_a_reward_is_a_finite_number(reward):
    with pytest.raises((TypeError, ValueError), match="reward"):
        Step("seen", reward)


def test_a_step_says_text_and_success_at_the_end_only():
    with pytest.raises(TypeError, match="not text"):
        Step(["seen"])
    with pytest.raises(ValueError, match="when the episode is done"):
        Step("seen", success=True)


def test_an_action_that_cannot_be_done_changes_nothing():
    rooms = world()
    seen = rooms.look()
    for action in ("", "go", "go up", "take key now", "open chest now", "sing"):
        step = rooms.step(action)
        assert not step.valid and step.reward == 0 and not step.done and step.observation == f"no . {seen}"


def test_only_the_chest_with_the_key_is_rewarded():
    for problem in generate_problems(TaskSource(task="rooms", levels=[2, 5, 9], size=60), "x"):
        taken = solved(problem)
        assert [step.reward for _, step in taken[:-1]] == [0.0] * (len(taken) - 1)
        assert taken[-1][0] == "open chest" and taken[-1][1].reward == 1.0 and taken[-1][1].success
        # Without the key the same way leads to a locked chest.
        rooms = Rooms()
        rooms.reset(problem, seed=0)
        steps = [rooms.step(action) for action, _ in taken if action != "take key"]
        assert steps[-1].observation.startswith("locked") and not steps[-1].done


def test_a_shaped_reward_comes_to_the_same_sum():
    rooms = world(shaped=True)
    steps = [rooms.step(action) for action, _ in solved(PROBLEM)]
    assert sum(step.reward for step in steps) == 1.0 and sorted(step.reward for step in steps)[-2:] == [0.2, 0.8]


def test_the_same_seed_draws_the_same_noise_and_another_one_does_not():
    ways = ["go north", "go south", "go east", "go west"] * 10

    def walk(seed):
        rooms = Rooms(noise=0.5)
        rooms.reset(PROBLEM, seed)
        return [rooms.step(way) for way in ways]

    assert walk(1) == walk(1)
    assert walk(1) != walk(2)


def test_how_well_the_agents_do():
    """The shares that the recipes start from; of 300 worlds, within four standard deviations."""
    for level, expert, weak in ((3, 1.0, 0.61), (5, 1.0, 0.30), (8, 0.68, 0.11)):
        problems = generate_problems(TaskSource(task="rooms", levels=[level], size=300), "x")
        agents = [[Expert() for _ in problems], [Weak(random.Random(n), 0.5) for n, _ in enumerate(problems)]]
        wins = [sum(play(*pair)[1] for pair in zip(problems, own, strict=True)) / 300 for own in agents]
        for share, expected in zip(wins, (expert, weak), strict=True):
            assert abs(share - expected) < 4 * max((expected * (1 - expected) / 300) ** 0.5, 0.001)


@pytest.mark.parametrize("level", LEVELS)
def test_traces_are_conversations_that_the_world_repeats(level):
    for annotator in ("expert", "weak"):
        source = TaskSource(task="rooms", levels=[level], size=20, annotator=annotator)
        for example in generate_examples(source, "x"):
            said = [message["content"] for message in example.completion]
            assert [message["role"] for message in example.completion[:2]][:1] == ["assistant"]
            rooms = Rooms()
            rooms.reset(example.problem, seed=9)
            assert rooms.look() == example.problem.prompt
            assert [rooms.step(action).observation for action in said[::2]][: len(said) // 2] == said[1::2]
            done = (
                rooms.look().startswith("opened")
                or TASKS["rooms"].check_strict(example.problem, "\n".join(said[::2])).status
            )
            assert done in ("correct", "wrong")


def test_a_plan_of_actions_is_judged_by_playing_it():
    task, plan = TASKS["rooms"], "\n".join(action for action, _ in solved(PROBLEM))
    assert task.check_strict(PROBLEM, plan).status == "correct"
    assert task.check_strict(PROBLEM, plan.replace("take key\n", "")).status == "wrong"
    assert task.check_lenient(PROBLEM, "").status == "wrong"


def test_the_weak_agent_passes_by_as_often_as_its_weakness_says():
    careful = generate_examples(
        TaskSource(task="rooms", levels=[3], size=200, annotator="weak", weakness=WeakAnnotator(unsure_share=0.0)), "x"
    )
    careless = generate_examples(
        TaskSource(task="rooms", levels=[3], size=200, annotator="weak", weakness=WeakAnnotator(unsure_share=0.9)), "x"
    )
    taken = [sum("take key" in str(e.completion) for e in examples) for examples in (careful, careless)]
    assert taken[0] > taken[1] + 60
