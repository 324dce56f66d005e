"""RLSP's reward: values by hand, after the authors' code (lengths there are characters / 4)."""

import pytest
import torch

from posttrain.objectives.exploration import groups_that_differ, mixed_reward, search_reward


def test_search_reward():
    outcomes = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    unanswered = torch.tensor([False, False, False, True, False])
    lengths = torch.tensor([2000, 500, 2000, 1000, 0])
    found = search_reward(outcomes, unanswered, lengths, no_answer=0.5, length_cost=1000.0)
    assert found.tolist() == pytest.approx([0.5, -1.0, -0.5, -1.5, -999.0])
    assert search_reward(outcomes, unanswered, lengths, 0.5, 0.0).tolist() == [1.0, 1.0, 0.0, -0.5, 1.0]


def test_mixed_reward():
    search, exploration = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    assert mixed_reward(search, exploration, 0.8).tolist() == pytest.approx([0.58])
    assert mixed_reward(search, exploration, 1.0).tolist() == [0.5]


def test_groups_that_differ_looks_at_known_rows_only():
    outcomes = torch.tensor([1.0, 0, 1, 1, 0, 0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    known = torch.tensor([True, True, True, True, True, False])
    assert groups_that_differ(outcomes, groups, known).tolist() == [True, True, False, False, False, False]
