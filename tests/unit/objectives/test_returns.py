"""GAE, returns and whitening: the sheets' numbers, and brute force on random masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objectives.returns import (
    at_end,
    clipped_value_loss,
    discounted_returns,
    explained_variance,
    gae,
    moments,
    whiten,
)


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, t(expected), rtol=0, atol=atol)


REWARDS, VALUES = [[0.0111571776, 0.034657359, -0.0111571776, 1.0111571776]], [[0.1, 0.2, 0.3, 0.5]]


def test_gae_of_a_reset_episode():
    advantages, returns = gae(t(REWARDS), t(VALUES), torch.ones(1, 4).bool(), 1.0, 0.95)
    close(advantages, [[0.847765701, 0.7753773931, 0.6744421411, 0.5111571776]], 1e-8)
    close(returns, [[0.947765701, 0.9753773931, 0.9744421411, 1.0111571776]], 1e-8)


def test_gae_with_a_discount():
    advantages, _ = gae(t([[0, 0, 0, 1.0]]), t([[0.1, 0.2, 0.4, 0.6]]), torch.ones(1, 4).bool(), 0.99, 0.95)
    close(advantages, [[0.7867028506, 0.7322731, 0.5702, 0.4]])


def test_gae_of_dense_rewards():
    advantages, returns = gae(t([[0.017, -0.022, 0.825]]), t([[0.2, 0.3, 0.4]]), torch.ones(1, 3).bool(), 1.0, 0.95)
    close(advantages, [[0.5746625, 0.48175, 0.425]])
    close(returns, [[0.7746625, 0.78175, 0.825]])


def brute_force(rewards, values, mask, gamma, lam):
    """The definition on the tokens under the mask: A_t = sum over l of (gamma lambda)^l delta_(t+l)."""
    advantages = torch.zeros_like(values)
    for row in range(len(values)):
        places = [i for i in range(mask.size(1)) if mask[row, i] > 0]
        following = [*(float(values[row, i]) for i in places[1:]), 0.0][: len(places)]
        deltas = [
            float(rewards[row, i]) + gamma * after - float(values[row, i])
            for i, after in zip(places, following, strict=True)
        ]
        for k, i in enumerate(places):
            advantages[row, i] = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[k:]))
    return advantages


@st.composite
def trajectories(draw):
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    numbers = st.floats(-3, 3, allow_nan=False)
    grid = st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=rows, max_size=rows)
    bits = st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    unit = st.floats(0, 1)
    return t(draw(grid)), t(draw(grid)), torch.tensor(draw(bits)), draw(unit), draw(unit)


@given(trajectories())
@settings(max_examples=60, deadline=None)
def test_gae_is_the_definition_on_any_mask(case):
    rewards, values, mask, gamma, lam = case
    expected = brute_force(rewards, values, mask, gamma, lam)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returns, torch.where(mask > 0, expected + values, 0.0), rtol=1e-9, atol=1e-9)


@given(trajectories())
@settings(max_examples=40, deadline=None)
def test_returns_are_discounted_sums_of_what_follows(case):
    rewards, _, mask, gamma, _ = case
    found = discounted_returns(rewards, mask, gamma)
    for row in range(len(mask)):
        places = [i for i in range(mask.size(1)) if mask[row, i] > 0]
        for k, i in enumerate(places):
            expected = sum(gamma**n * float(rewards[row, j]) for n, j in enumerate(places[k:]))
            assert float(found[row, i]) == pytest.approx(expected, abs=1e-9)
        assert (found[row][mask[row] == 0] == 0).all()


def test_what_is_masked_may_be_anything():
    mask = t([[0, 1, 0, 1, 0]]).bool()
    rewards, values = t([[0, 0.5, 0, 1, 0]]), t([[0, 0.2, 0, 0.3, 0]])
    spoilt = torch.where(mask > 0, values, torch.nan)
    for one, other in zip(gae(rewards, values, mask, 0.9, 0.8), gae(rewards, spoilt, mask, 0.9, 0.8), strict=True):
        assert torch.equal(one, other)


def test_at_end_finds_the_last_trained_token():
    mask = t([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    close(at_end(t([2.0, 3.0, -1.0]), mask), [[0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, -1]])


def test_whitening_as_in_the_sheet():
    advantages, _ = gae(t(REWARDS), t(VALUES), torch.ones(1, 4).bool(), 1.0, 0.95)
    everything, kept = torch.ones(1, 4).bool(), t([[0, 0, 1, 1]]).bool()
    found = whiten(advantages, everything, moments(advantages, everything))
    close(found, [[1.1526040376, 0.5794827303, -0.2196538324, -1.5124329355]], 1e-6)
    found = whiten(advantages, kept, moments(advantages, kept))
    close(found, [[0, 0, 0.9999992499, -0.9999992499]], 1e-6)
    rewards = t([[0, 0, 1, 0]])
    found = whiten(rewards, everything, moments(rewards, everything), shift=False)
    close(found, [[-0.3273502538, -0.3273502538, 1.9820507614, -0.3273502538]], 1e-7)


def test_whitening_over_parts_is_whitening_of_the_whole():
    values, mask = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6) > 0.4
    whole = whiten(values, mask, moments(values, mask))
    of = sum(moments(values[i : i + 1], mask[i : i + 1]) for i in range(4))
    parts = torch.cat([whiten(values[i : i + 1], mask[i : i + 1], of) for i in range(4)])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert float(whole.sum()) == pytest.approx(0, abs=1e-9)


def test_clipped_value_loss_of_the_sheet():
    _, returns = gae(t(REWARDS), t(VALUES), torch.ones(1, 4).bool(), 1.0, 0.95)
    losses = clipped_value_loss(t([[0.4, 0.1, 0.6, 0.9]]), t(VALUES), returns, 0.2)
    assert float(losses.mean()) == pytest.approx(0.1884750148, abs=1e-8)
    assert float(losses[0, 2:].mean()) == pytest.approx(0.0804785336, abs=1e-8)


def test_clipped_value_loss_has_no_gradient_where_the_clip_is_worse():
    # beyond the clip and already past the return on that side: the clipped distance is the larger one
    values = t([[0.9, 0.9]]).requires_grad_()
    clipped_value_loss(values, t([[0.1, 0.8]]), t([[1.0, 0.0]]), 0.2).sum().backward()
    close(values.grad, [[0.0, 0.9]])


def test_explained_variance():
    mask, targets = torch.ones(1, 4, dtype=torch.bool), t([[1, 2, 3, 4]])

    def of(values):
        return float(explained_variance(moments(targets - values, mask), moments(targets, mask)))

    assert of(targets) == pytest.approx(1.0)
    assert of(torch.full((1, 4), 2.5).double()) == pytest.approx(0.0)
    assert of(-targets) == pytest.approx(-3.0)
    constant = torch.ones(1, 4, dtype=torch.float64)
    assert float(explained_variance(moments(constant, mask), moments(constant, mask))) == 0


def test_explained_variance_of_two_heads_is_about_their_own_means():
    """Residuals of variance 1 and 0 around their means, targets of variance 4 and 9; 2 and 4 tokens."""
    residuals = torch.stack(
        [moments(t([[1, 3]]), torch.ones(1, 2).bool()), moments(t([[7] * 4]), torch.ones(1, 4).bool())]
    )
    targets = torch.stack(
        [moments(t([[1, 5]]), torch.ones(1, 2).bool()), moments(t([[90, 96] * 2]), torch.ones(1, 4).bool())]
    )
    assert float(explained_variance(residuals, targets)) == pytest.approx(1 - 2 * 1 / (2 * 4 + 4 * 9))
    empty = torch.zeros(1, 3, dtype=torch.float64)
    padded = [torch.cat([each[:1], empty]) for each in (residuals, targets)]
    assert float(explained_variance(*padded)) == pytest.approx(1 - 1 / 4)
