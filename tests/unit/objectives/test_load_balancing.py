"""The load-balancing loss of routers, by hand and against the one that transformers' models have."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from posttrain.objectives.load_balancing import expert_counts, load_balancing_loss, probability_sums


def loss(logits, weights, top_k):
    counts = expert_counts(logits, weights, top_k)
    return load_balancing_loss(counts, probability_sums(logits, weights), counts.sum() / top_k)


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_values_computed_by_hand():
    # One layer, three experts, one for each token. Tokens go to experts 0, 0 and 1, so f = (2/3, 1/3, 0).
    logits = logits_of((0.5, 0.3, 0.2), (0.6, 0.3, 0.1), (0.2, 0.7, 0.1))
    # P = (1.3, 1.3, 0.4) / 3, and 3 * (2/3 * 1.3/3 + 1/3 * 1.3/3) = 1.3.
    assert loss((logits,), torch.ones(3), 1).item() == pytest.approx(1.3, abs=1e-12)
    # The third token is padding: f = (1, 0, 0), P = (1.1, 0.6, 0.3) / 2, and 3 * 0.55 = 1.65.
    assert loss((logits,), torch.tensor([1.0, 1.0, 0.0]), 1).item() == pytest.approx(1.65, abs=1e-12)
    # Two experts for each token: f = (1, 1, 0) without the third token, and 3 * (1.1 + 0.6) / 2 = 2.55.
    assert loss((logits,), torch.tensor([1.0, 1.0, 0.0]), 2).item() == pytest.approx(2.55, abs=1e-12)


def test_it_is_the_number_of_experts_of_a_token_where_all_are_equally_busy():
    even = logits_of((0.7, 0.1, 0.1, 0.1), (0.1, 0.7, 0.1, 0.1), (0.1, 0.1, 0.7, 0.1), (0.1, 0.1, 0.1, 0.7))
    assert loss((even, even), torch.ones(4), 1).item() == pytest.approx(1.0, abs=1e-12)
    collapsed = torch.tensor([[30.0, 0.0, 0.0, 0.0]], dtype=torch.float64).expand(4, 4)
    assert loss((collapsed, collapsed), torch.ones(4), 1).item() == pytest.approx(4.0, abs=1e-9)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_value_and_gradient_are_those_of_transformers(top_k):
    torch.manual_seed(0)
    layers = [torch.randn(12, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    theirs = load_balancing_loss_func(tuple(layers), 5, top_k, mask)
    ours = loss(layers, mask.flatten(), top_k)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs sums in float32
    found, expected = torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_parts_of_a_batch_add_up():
    torch.manual_seed(0)
    layers = [torch.randn(9, 4, dtype=torch.float64) for _ in range(2)]
    weights = torch.tensor([1, 2, 0, 1, 1, 3, 0, 1, 1], dtype=torch.float64)
    parts = [([layer[part] for layer in layers], weights[part]) for part in (slice(0, 4), slice(4, 5), slice(5, 9))]
    counts = sum(expert_counts(*part, 2) for part in parts)
    total = sum(load_balancing_loss(counts, probability_sums(*part), counts.sum() / 2) for part in parts)
    assert total.item() == pytest.approx(loss(layers, weights, 2).item(), rel=1e-12)
    often = weights.long()  # a token that three rows hold counts as three
    repeated = [layer.repeat_interleave(often, dim=0) for layer in layers]
    assert total.item() == pytest.approx(loss(repeated, torch.ones(int(often.sum())), 2).item(), rel=1e-12)
