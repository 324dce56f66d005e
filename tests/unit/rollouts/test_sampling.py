import numpy as np
import pytest
import torch

from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.sampling import choose, restrict, uniforms


def test_uniforms_depend_on_their_key_alone():
    first = uniforms(1, 2, 3, 8)
    assert np.array_equal(first, uniforms(1, 2, 3, 8))
    assert np.array_equal(first[:4], uniforms(1, 2, 3, 4))
    others = [uniforms(*key, 8) for key in [(0, 2, 3), (1, 3, 3), (1, 2, 4), (2**64 - 1, 2, 3)]]
    assert all(not np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("key", [(2**63, 2**21, 1), (2**64 - 2, 2**22, 4), (5, 2**31, 0)])
def test_completions_of_a_late_prompt_have_draws_of_their_own(key):
    seed, prompt, completion = key
    first, second = (uniforms(seed, prompt, completion + n, 8) for n in (0, 1))
    assert not np.array_equal(first, second)


def test_restrict_keeps_the_nucleus_and_the_top_k():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda **k: (restrict(logits, **k) > -torch.inf).tolist()[0]  # noqa: E731
    assert kept(top_p=1.0, top_k=None) == [True] * 4
    assert kept(top_p=0.5, top_k=None) == [True, False, False, False]
    assert kept(top_p=0.51, top_k=None) == [True, True, False, False]
    assert kept(top_p=1e-9, top_k=None) == [True, False, False, False]
    assert kept(top_p=1.0, top_k=3) == [True, True, True, False]
    assert kept(top_p=1.0, top_k=9) == [True] * 4


@pytest.mark.parametrize(
    ("draw", "expected"), [(0.0, 1), (0.1999, 1), (0.2001, 2), (0.4999, 2), (0.5001, 4), (1 - 1e-16, 4)]
)
def test_a_draw_picks_by_the_cumulative_distribution(draw, expected):
    logits = torch.tensor([[0.0, 0.2, 0.3, 0.0, 0.5]]).log()
    tokens, logps = choose(logits, Sampling(), torch.tensor([draw], dtype=torch.float64))
    assert tokens.tolist() == [expected]
    assert logps.exp().tolist() == pytest.approx([{1: 0.2, 2: 0.3, 4: 0.5}[expected]])


def test_frequencies_follow_the_temperature():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(20_000, 3)
    draws = torch.from_numpy(np.random.default_rng(0).random(20_000))
    tokens, logps = choose(logits, Sampling(temperature=2.0), draws)
    expected = (logits[0] / 2).softmax(0)
    shares = torch.bincount(tokens, minlength=3) / 20_000
    assert (shares - expected).abs().max() < 0.015  # four standard errors
    assert torch.allclose(logps.exp(), expected[tokens])


def test_greedy_takes_the_likeliest_whatever_the_draw():
    tokens, _ = choose(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(greedy=True), torch.tensor([0.99]).double())
    assert tokens.tolist() == [1]
