"""Environments of an installed Gymnasium, by words; left out where it is not installed."""

from contextlib import closing

import pytest

pytest.importorskip("gymnasium")

from posttrain.data.episodes import Episode, Stop, Turn
from posttrain.data.sample import Problem
from posttrain.environments.base import Failure, Step
from posttrain.environments.gymnasium import GymnasiumText
from posttrain.environments.pool import EnvironmentPool
from posttrain.errors import WorldError
from posttrain.rollouts.episodes import replayed

MAP = ["SFF", "HFH", "HFG"]
LAKE = {"id": "FrozenLake-v1", "actions": ["left", "down", "right", "up"], "columns": ["desc"], "workers": 0}
PROBLEM = Problem("p/0", "walk to G", meta={"desc": MAP})


def lake(**changes):
    return GymnasiumText.Config(**(LAKE | {"options": {"is_slippery": False}} | changes))


def played(pool, words, seed=3, number=0):
    (opening,) = pool.reset({number: (PROBLEM, seed)}).values()
    episode = Episode(PROBLEM, 0, seed, opening, stop=Stop.DONE)
    for word in words:
        (step,) = pool.step({number: word}).values()
        assert isinstance(step, Step)
        episode.turns.append(Turn(word, step))
        if step.done:
            break
    pool.end([number])
    return episode


def test_a_lake_is_walked_over_by_words():
    with closing(EnvironmentPool(lake())) as pool:
        won = played(pool, ["right", "swim", " down\n", "down", "right"])
        assert won.opening == "[S]FF\nHFH\nHFG"
        assert [step.observation for step in won.steps][:2] == [
            "(Right)\nS[F]F\nHFH\nHFG",
            "Error: say one of: left, down, right, up",
        ]
        assert [step.valid for step in won.steps] == [True, False, True, True, True]
        assert won.total == 1 and won.outcome == 1
        lost = played(pool, ["down"])
        assert lost.outcome == 0 and lost.steps[-1].done


def test_what_the_environment_draws_is_the_seeds():
    config = lake(options={"is_slippery": True}, workers=1)
    with closing(EnvironmentPool(config)) as pool:
        episodes = [played(pool, ["right", "down"] * 9, seed, seed) for seed in range(4)]
        assert len({tuple(step.observation for step in episode.steps) for episode in episodes}) > 1
        assert replayed(pool, episodes) == [None] * 4


def test_without_a_drawing_the_observation_is_shown():
    config = lake(id="Blackjack-v1", actions=["stick", "hit"], columns=[], options={})
    with closing(EnvironmentPool(config)) as pool:
        assert played(pool, ["stick"]).opening.startswith("(")


def test_what_is_not_there_is_said():
    with pytest.raises(WorldError, match="FrozenLak"), closing(EnvironmentPool(lake(id="FrozenLak-v1"))) as pool:
        pool.start()
    with closing(EnvironmentPool(lake(actions=["left", "right"]))) as pool:
        (failure,) = pool.reset({0: (PROBLEM, 0)}).values()
        assert isinstance(failure, Failure) and "4 numbered actions, and there are 2 words" in failure.detail
