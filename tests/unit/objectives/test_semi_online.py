"""Advantages along recorded episodes, against values by hand in float64."""

import pytest
import torch

from posttrain.methods.base import Scored
from posttrain.methods.ui_s1 import UIS1, UIS1Config
from posttrain.objectives.semi_online import (
    episode_advantages,
    segment_returns,
    semi_online_performance,
    step_advantages,
)

GROUP = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
TURNS = torch.tensor([4, 2, 3])


def table(*rows):
    return torch.tensor([[*row, *[0.0] * (4 - len(row))] for row in rows], dtype=torch.float64)


def close(found, *expected):
    assert torch.allclose(found, table(*expected), atol=1e-9, rtol=0), found


REWARDS = table([0.9, 0.8, 0.2, 1], [0.9, 0.1], [0.5, 0.9, 0.9])
MATCHES = table([1, 1, 0, 1], [1, 0], [0, 1, 1]) > 0
RETURNS = [[1.3, 0.8, 0.2, 1], [0.9, 0.1], [0.5, 1.35, 0.9]]
A_S = [[0.4, 0.05, -0.35, 0], [0, -0.65], [-0.4, 0.6, 0.35]]
A_E = [0.8333333333333, -1.0666666666667, 0.2333333333333]


def test_returns_of_stretches_that_match():
    close(segment_returns(REWARDS, MATCHES, 0.5, "code"), *RETURNS)
    close(segment_returns(REWARDS, MATCHES, 0.5, "paper")[:1], [1.35, 0.9, 0.2, 1])


def test_both_advantages():
    of = (TURNS, *GROUP)
    close(step_advantages(table(*RETURNS), *of, "none"), *A_S)
    scaled = step_advantages(table(*RETURNS), *of, "group")
    close(scaled[:2], [0.9999975, 0.0798085611, -0.7071053526, 0], [0, -1.0375112938])
    close(scaled[2:], [-0.9999975, 0.9577027327, 0.7071053526])
    whole = [[value] * turns for value, turns in zip(A_E, TURNS.tolist(), strict=True)]
    close(episode_advantages(REWARDS, *of, "none", "return"), *whole)
    by_deviation = [0.8579968954, -1.0982360261, 0.2402391307]
    found = episode_advantages(REWARDS, *of, "group", "return")
    close(found, *[[value] * turns for value, turns in zip(by_deviation, TURNS.tolist(), strict=True)])
    pooled = episode_advantages(REWARDS, *of, "none", "pooled_steps")
    close(pooled[:1], [0.2111111111, 0.1111111111, -0.4888888889, 0.3111111111])
    close(pooled[1:], [0.2111111111, -0.5888888889], [-0.1888888889, 0.2111111111, 0.2111111111])


def scored(rewards, parts, groups):
    """Rows of these turn rewards; part 0 begins an episode."""
    width = max(map(len, rewards))
    turns = torch.tensor(list(map(len, rewards)))
    n = len(rewards)
    filled = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rewards], dtype=torch.float64)
    episodes = torch.tensor([part == 0 for part in parts]).cumsum(0) - 1
    ones = torch.ones(n)
    known = torch.ones(n, dtype=torch.bool)
    of = {"turn_rewards": filled, "turns": turns, "episodes": episodes}
    return Scored(ones, ones, known, torch.tensor(groups), turns, known, 8, **of)


def test_rows_of_an_episode_get_what_its_turns_get():
    """An episode that was patched behind its third turn is two rows; only a reward of 1 is a match."""
    rewards = [[1, 1, 0.2], [1.0], [1, 0.1], [0.55, 1, 1]]
    method = UIS1(UIS1Config(scale_rewards="none"))
    found = method.advantages(scored(rewards, [0, 1, 0, 0], [0, 0, 0, 0]))
    whole = table([1, 1, 0.2, 1], [1, 0.1], [0.55, 1, 1])
    returns = segment_returns(whole, whole == 1, 0.5, "code")
    expected = step_advantages(returns, TURNS, *GROUP, "none") + episode_advantages(
        whole, TURNS, *GROUP, "none", "return"
    )
    assert torch.allclose(found[0], expected[0, :3]) and torch.allclose(found[1], torch.tensor([expected[0, 3], 0, 0]))
    assert torch.allclose(found[2, :2], expected[1, :2]) and torch.allclose(found[3], expected[2, :3])


def test_groups_alike_at_the_first_turn_are_left_out():
    rows = scored([[1, 1], [0.1], [1], [1, 1], [1]], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1])
    # First returns 1.5 and 0.1 in the first group, 1.5 and 1 in the second: deviations 0.99 and 0.35.
    assert UIS1(UIS1Config(filter_std=0.5)).keep(rows).tolist() == [True, True, True, False, False]
    assert UIS1(UIS1Config()).keep(rows).all()


def test_the_measure_of_recorded_tasks():
    assert semi_online_performance([3, 5, 1], [5, 5, 4]) == pytest.approx((0.6166666667, 1 / 3, 0.475))
