"""Losses and aggregates of process reward models by hand, in float64."""

import pytest
import torch

from posttrain.objectives.process import aggregated, step_losses

LOGITS = torch.tensor([[0.2, 1.4], [0.5, 0.1], [1.0, -1.0]], dtype=torch.float64)  # of a head with two outputs
RIGHT = torch.tensor([True, False, False])


def near(expected):
    return pytest.approx(expected, abs=1e-11)


def test_loss_and_gradient_are_those_of_two_outputs_and_their_cross_entropy():
    two = LOGITS.clone().requires_grad_()
    losses = step_losses(two[:, 1] - two[:, 0], RIGHT)
    assert float(losses.detach().sum()) == near(0.903225730781)
    (gradient,) = torch.autograd.grad(losses.sum(), two)
    assert gradient[:, 0].tolist() == near([0.231475216501, -0.401312339888, -0.119202922022])
    assert gradient[:, 1].tolist() == near([-0.231475216501, 0.401312339888, 0.119202922022])
    whole = torch.nn.functional.cross_entropy(LOGITS, RIGHT.long(), reduction="sum")
    assert float(losses.detach().sum()) == near(float(whole))


def test_far_scores_are_finite_in_float32():
    scores = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = step_losses(scores, torch.tensor([False, True]))
    assert losses.tolist() == [1e4, 1e4]
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert gradient.tolist() == [1.0, -1.0]


def test_aggregates():
    rights = torch.sigmoid(LOGITS[:, 1] - LOGITS[:, 0]).tolist()
    assert rights == near([0.768524783499, 0.401312339888, 0.119202922022])
    found = {name: aggregated(rights, name) for name in ("min", "product", "last", "mean")}
    assert found == {
        "min": near(0.119202922022),
        "product": near(0.036764383918),
        "last": near(0.119202922022),
        "mean": near(0.429680015136),
    }
    with pytest.raises(ValueError, match="no step"):
        aggregated([], "min")
