"""Advantages by hand, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.objectives.advantages import group_advantages, group_statistics, informative_groups


def advantages(rewards, *, known=None, **options):
    rows = torch.tensor(rewards, dtype=torch.float64)
    groups = torch.arange(rows.size(0)).repeat_interleave(rows.size(1))
    known = torch.ones(rows.numel(), dtype=torch.bool) if known is None else torch.tensor(known).flatten()
    return group_advantages(rows.flatten(), groups, known, **options).view_as(rows)


def test_grpo():
    a = advantages([[1, 0, 0, 0], [1, 1, 1, 0]])
    assert a.tolist()[0] == pytest.approx([1.49970006] + [-0.49990002] * 3, abs=1e-8)
    assert a.tolist()[1] == pytest.approx([0.49990002] * 3 + [-1.49970006], abs=1e-8)
    assert advantages([[1, 0, 0, 1]])[0].tolist() == pytest.approx(
        [0.8658754298, -0.8658754298, -0.8658754298, 0.8658754298]
    )


def test_lite_ppo_divides_by_the_deviation_of_the_batch():
    a = advantages([[1, 0, 0, 0], [1, 1, 1, 0]], scale="batch")
    assert a.tolist()[0] == pytest.approx([1.4028590691] + [-0.4676196897] * 3, abs=1e-9)
    assert a.tolist()[1] == pytest.approx([0.4676196897] * 3 + [-1.4028590691], abs=1e-9)


def test_lite_ppo_on_concentrated_rewards():
    a = advantages([[1, 1, 1, 1], [1, 1, 1, 0]], scale="batch")
    assert a.tolist()[0] == [0.0] * 4
    assert a.tolist()[1] == pytest.approx([0.7069068377] * 3 + [-2.1207205132], abs=1e-9)


def test_mean_only():
    a = advantages([[1, 0, 1, 1, 0, 0, 1, 1]], scale="none")
    assert a[0].tolist() == pytest.approx([0.375, -0.625, 0.375, 0.375, -0.625, -0.625, 0.375, 0.375])
    scaled = advantages([[1, 0, 1, 1, 0, 0, 1, 1]])
    assert scaled[0, :2].tolist() == pytest.approx([0.7244288644, -1.2073814406], abs=1e-9)


def test_leave_one_out():
    a = advantages([[1, 0, 0, 1]], baseline="leave_one_out", scale="none")
    assert a[0].tolist() == pytest.approx([0.6666666667, -0.6666666667, -0.6666666667, 0.6666666667])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale):
    assert advantages([[0.1] * 3, [0.7] * 3], scale=scale).abs().max() == 0


def test_divided_by_the_mean():
    """2 right of 8; all wrong gives no signal, and what is expected of it would be -1."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0] + [0.0] * 8, dtype=torch.float64)
    found = group_advantages(rewards, torch.arange(16) // 8, torch.ones(16, dtype=torch.bool), scale="mean")
    assert found.tolist() == pytest.approx([3, -1, -1, 3, -1, -1, -1, -1] + [0] * 8)


@pytest.mark.parametrize(("p", "n"), [(0.1, 8), (0.5, 4)])
def test_divided_by_the_mean_it_is_the_gradient_of_the_log_series_but_for_groups_that_are_all_wrong(p, n):
    """Over all numbers of right answers; the score of a right answer is (1 - p), of a wrong one -p."""
    expected = 0.0
    for k in range(n + 1):
        rewards = torch.tensor([1.0] * k + [0.0] * (n - k), dtype=torch.float64)
        zeros, known = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.bool)
        advantages = group_advantages(rewards, zeros, known, scale="mean")
        expected += math.comb(n, k) * p**k * (1 - p) ** (n - k) * float((advantages * (rewards - p)).mean())
    weight = sum((1 - p) ** (k - 1) for k in range(1, n + 1))  # of -sum (1 - p)^k / k, by dp
    assert expected == pytest.approx(p * (1 - p) * weight - p * (1 - p) ** n, abs=1e-12)


def test_whitened_over_tokens():
    """Two rows of two and three tokens, each against its group's mean."""
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    rows = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    found = group_advantages(rewards, *rows, scale="tokens", eps=0.0, lengths=torch.tensor([2, 3]))
    assert found.tolist() == pytest.approx([1.224744871392, -0.816496580928], abs=1e-11)
    assert float((found * torch.tensor([2, 3])).sum()) == pytest.approx(0, abs=1e-12)


def test_unknown_rows_enter_no_statistic():
    with_unknown = advantages([[1, 0, 9, 1]], known=[[True, True, False, True]])
    without = advantages([[1, 0, 1]])
    assert with_unknown[0, [0, 1, 3]].tolist() == without[0].tolist()
    assert with_unknown[0, 2] == 0


def test_a_row_alone_in_its_group_gets_zero():
    assert advantages([[1, 0]], known=[[True, False]]).tolist() == [[0.0, 0.0]]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(["mean", "leave_one_out"]),
    st.sampled_from(["group", "batch", "none"]),
)
def test_advantages_of_a_group_sum_to_zero(rewards, baseline, scale):
    a = advantages(rewards, baseline=baseline, scale=scale)
    assert a.sum(dim=1).abs().max() < 1e-9


def test_statistics_and_informative_groups():
    rewards = torch.tensor([1.0, 0, 5, 5, 2], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2])
    known = torch.ones(5, dtype=torch.bool)
    centred, deviations, sizes = group_statistics(rewards, groups, known)
    assert centred.tolist() == [0.5, -0.5, 0, 0, 0]
    assert deviations.tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0, 0])
    assert sizes.tolist() == [2, 2, 2, 2, 1]
    assert informative_groups(rewards, groups, known) == (1, 3)
