"""Clip-Cov: covariances by hand, draws that no split changes, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from posttrain.methods.companions import DROPPED, CovariantTokens
from posttrain.methods.grpo import GRPO, GRPOConfig
from posttrain.models.collate import FURTHER
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.policy_gradient import covariances
from posttrain.trainers.covariance import mark_covariant


def t(values):
    return torch.tensor(values, dtype=torch.float64)


LOGPS, ADVANTAGES = t([[-0.5, -1.5, 0.0], [-1.0, 0.0, 0.0]]), t([1.0, -2.0])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_covariances_by_hand():
    """Means over the three tokens: -1 and 0."""
    found = covariances(LOGPS, ADVANTAGES, -1.0, 0.0)
    assert found[MASK].tolist() == pytest.approx([0.5, -0.5, 0.0])


def marked(rows, places, share=1.0, low=0.4, seed=7):
    made = [{"old_logps": LOGPS[r], "advantages": ADVANTAGES[r], "mask": MASK[r]} for r in rows]
    mark_covariant(CovariantTokens(share, low, 5.0), made, places, seed)
    return [tensors[FURTHER + DROPPED].tolist() for tensors in made]


def test_tokens_within_the_bounds_are_drawn_and_no_others():
    whole = marked([[0, 1]], [[0, 1]])
    assert whole == [[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    assert marked([[0], [1]], [[0], [1]]) == [[whole[0][0]], [whole[0][1]]]
    assert marked([[0, 1]], [[0, 1]], low=0.6) == [[[0.0] * 3] * 2]


def test_a_share_is_drawn_on_average():
    """One of three tokens is a candidate, so at a share of 0.1 it is drawn three times in ten."""
    drawn = sum(marked([[0, 1]], [[0, 1]], share=0.1, seed=seed)[0][0][0] for seed in range(400))
    assert 90 < drawn < 150


def test_a_dropped_token_has_no_gradient_and_is_counted():
    logps = LOGPS.clone().requires_grad_()
    further = {DROPPED: t([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])}
    batch = TokenBatch(MASK, logps, old_logps=LOGPS, advantages=ADVANTAGES, further=further)
    part = GRPO(GRPOConfig(clip_cov=0.1, aggregation="tokens")).loss(batch)["policy"]
    part.value.backward()
    assert logps.grad.tolist() == [[0.0, -1.0, 0.0], [2.0, 0.0, 0.0]] and int(part.count) == 3
    dropped, tokens = part.diagnostics["clip_cov/dropped"]
    assert (int(dropped), int(tokens)) == (1, 3)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"clip_cov_low": 2.0}, "without clip_cov"),
        ({"clip_cov": 0.1, "clip_cov_low": 6.0}, "not below"),
        ({"clip_cov": 0.1, "terms": {"outcome": {}}}, "remove it, or terms"),
    ],
)
def test_what_has_no_effect_is_refused(parameters, says):
    with pytest.raises(ValidationError, match=says):
        GRPOConfig(**parameters)
