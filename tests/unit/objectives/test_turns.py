"""Credit by turns, against values by hand in float64."""

from __future__ import annotations

import pytest
import torch

from posttrain.objectives.turns import over_tokens, returns_to_go, turn_advantages

SINGLE = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
"""One group of three known rows."""


def table(*rows: list[float]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rewards", "discount", "expected"),
    [
        ([0, 0, 1], 0.9, [0.81, 0.9, 1]),
        ([0.1, -0.2, 0, 1], 0.95, [0.767375, 0.7025, 0.95, 1]),
        ([0, 0.5], 1, [0.5, 0.5]),
    ],
)
def test_returns_to_go(rewards, discount, expected):
    assert torch.allclose(returns_to_go(table(rewards), discount), table(expected), atol=1e-12, rtol=0)


def test_turns_are_compared_with_those_who_got_as_far():
    returns, turns = table([1.3, 0.8, 0.2, 1], [0.9, 0.1], [0.5, 1.35, 0.9]), torch.tensor([4, 2, 3])
    found = turn_advantages(returns, turns, *SINGLE, baseline="mean", scale="none")
    expected = table([0.4, 0.05, -0.35, 0], [0, -0.65], [-0.4, 0.6, 0.35])
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)
    scaled = turn_advantages(returns, turns, *SINGLE, baseline="mean", scale="group")
    deviations = torch.tensor([0.4, 0.6264982043070834, 0.4949747468305833], dtype=torch.float64)
    assert torch.allclose(scaled[:, :3], expected[:, :3] / (deviations + 1e-4), atol=1e-9, rtol=0)
    assert scaled[0, 3] == 0  # nobody else has a fourth turn


def test_a_further_turn_is_not_paid_for():
    """Two episodes stop at once with nothing, two go on and get 1: going on was right, and the baseline says so."""
    rewards, turns = table([0], [0], [0, 1], [0, 1]), torch.tensor([1, 1, 2, 2])
    groups, known = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    found = turn_advantages(returns_to_go(rewards, 1.0), turns, groups, known, baseline="mean", scale="none")
    assert found[:, 0].tolist() == [-0.5, -0.5, 0.5, 0.5] and found[:, 1].tolist() == [0, 0, 0, 0]


def test_an_unknown_row_enters_no_turn():
    returns, turns = table([1, 1], [0, 0], [9, 9]), torch.tensor([2, 2, 2])
    known = torch.tensor([True, True, False])
    found = turn_advantages(returns, turns, SINGLE[0], known, baseline="mean", scale="none")
    assert found.tolist() == [[0.5, 0.5], [-0.5, -0.5], [0, 0]]


def test_runs_of_the_mask_are_turns():
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0, 0, 0], [0] * 9], dtype=torch.bool)
    found = over_tokens(table([-1.5, 2.5], [3, 4], [7, 8]), mask)
    assert found.tolist() == [[0, 0, -1.5, -1.5, 0, 0, 2.5, 2.5, 2.5], [3, 0, 4, 0, 0, 0, 0, 0, 0], [0] * 9]
