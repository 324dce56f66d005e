"""OREO as the shell runs it: losses and gradients of the method on a hand-made batch, by the sheet's numbers."""

import pytest
import torch

from posttrain.methods import METHODS
from posttrain.methods.companions import DIVERGENCE
from posttrain.objectives.batch import TokenBatch

BETA = 0.5
RATIOS, VALUES = [[0.2, -0.4, 0.1], [0.3, -0.2, 9.0]], [[0.3, 0.6, 0.8], [0.5, 0.2, 9.0]]
STEPS = [[0, 0, 1], [0, 0, 0]]
VALUE_LOSS = 0.2958333333 + 0.15625
VALUE_GRADIENT = [[-0.5, -0.3666666667, -0.1], [0.55, 0.1, 0.0]]


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def oreo(**parameters):
    return METHODS["oreo"](METHODS["oreo"].Config(beta=BETA, **parameters))


def two_rows(divergence=None):
    """The rows of the sheet, a right one of three tokens and a wrong one of two; (batch, log-probs, values).

    The steps of the first are its tokens 0 and 1, and 2; the second is one step.
    """
    mask, reference = t([[1, 1, 1], [1, 1, 0]]).bool(), t([[-1.0, -0.5, -2.0], [-0.7, -1.5, 0.0]])
    logps = (reference + t(RATIOS)).requires_grad_()
    values = t(VALUES).requires_grad_()
    further = {"rewards": t([1.0, 0.0]), "steps": torch.tensor(STEPS)}
    further["further"] = {} if divergence is None else {DIVERGENCE: divergence}
    return TokenBatch(mask, logps, ref_logps=reference, values=values, **further), logps, values


@pytest.mark.parametrize(
    ("level", "loss", "gradient"),
    [
        # rows: e = V - R + beta D at every state; squared, then the mean over the row's states
        ("token", 0.2958333333 + 0.15625, [[-0.25, -0.1833333333, -0.05], [0.275, 0.05, 0.0]]),
        ("step", 0.2925 + 0.3025, [[-0.375, -0.375, -0.075], [0.55, 0.55, 0.0]]),
        ("response", 0.5625 + 0.3025, [[-0.75, -0.75, -0.75], [0.55, 0.55, 0.0]]),
    ],
)
def test_levels_as_in_the_sheet(level, loss, gradient):
    """Also that the summed terms have the gradients of their own parts: each holds the other's model fixed."""
    batch, logps, values = two_rows()
    terms = oreo(level=level, kl_reg=0.0).loss(batch)
    assert {name: float(term.count) for name, term in terms.items()} == {"value": 2, "policy": 2}
    assert terms["policy"].value.item() == pytest.approx(loss, abs=1e-9)
    assert terms["value"].value.item() == pytest.approx(VALUE_LOSS, abs=1e-9)
    of_policy, of_values = torch.autograd.grad(sum(term.value for term in terms.values()), (logps, values))
    torch.testing.assert_close(of_policy, t(gradient))
    torch.testing.assert_close(of_values, t(VALUE_GRADIENT))


@pytest.mark.parametrize(
    ("level", "loss", "gradient"),
    [
        # residuals -.2, -.4, -.15 and .5 - .2 + .5 * .3 = .45, .2 - 0 - .5 * .2 = .1
        ("token", 0.0741666667 + 0.10625, [[-0.0666666667, -0.1333333333, -0.05], [0.225, 0.05, 0.0]]),
        # residuals .3 - .8 - .5 * .2 = -.6, .8 - 1 + .5 * .1 = -.15 and .5 - 0 + .5 * .1 = .55
        ("step", 0.19125 + 0.3025, [[-0.3, -0.3, -0.075], [0.55, 0.55, 0.0]]),
        ("response", 0.5625 + 0.3025, [[-0.75, -0.75, -0.75], [0.55, 0.55, 0.0]]),
    ],
)
def test_one_step_at_a_time(level, loss, gradient):
    batch, logps, values = two_rows()
    terms = oreo(level=level, kl_reg=0.0, single_step_actor_loss=True).loss(batch)
    assert terms["policy"].value.item() == pytest.approx(loss, abs=1e-9)
    of_policy, of_values = torch.autograd.grad(sum(term.value for term in terms.values()), (logps, values))
    torch.testing.assert_close(of_policy, t(gradient))
    torch.testing.assert_close(of_values, t(VALUE_GRADIENT))


@pytest.mark.parametrize("unbiased", [True, False], ids=["whole vocabulary", "k3"])
def test_the_further_kl_as_in_the_sheet(unbiased):
    """[.7, .2, .1] against [.5, .3, .2], token 0 taken: the KL 0.085122826, and k3 of it 0.0507579509."""
    mask = t([[1, 1], [1, 0]]).bool()
    divergence = t([[0.085122826, 0.085122826], [0.085122826, 9.0]]).requires_grad_()
    logps = t(0.7).log().expand(2, 2).clone().requires_grad_()
    rewards, reference = t([1.0, 0.0]), t(0.5).log().expand(2, 2)
    given = {"values": torch.zeros_like(reference), "rewards": rewards, "further": {DIVERGENCE: divergence}}
    batch = TokenBatch(mask, logps, ref_logps=reference, **given)
    kl = oreo(kl_reg=0.01, unbiased_kl=unbiased).loss(batch)["kl"]
    assert kl.value.item() == pytest.approx(0.01 * 2 * (0.085122826 if unbiased else 0.0507579509), abs=1e-11)
    assert (kl.unit, float(kl.count)) == ("sequences", 2)
    of_policy, of_kl = torch.autograd.grad(kl.value, (logps, divergence), allow_unused=True)
    share = mask.double() / mask.sum(1, keepdim=True)  # of a token in the row's mean
    if unbiased:
        assert of_policy is None
        torch.testing.assert_close(of_kl, 0.01 * share)
    else:
        assert of_kl is None
        torch.testing.assert_close(of_policy, 0.01 * share * (1 - 0.5 / 0.7))


def test_turns_as_in_the_sheet():
    """Two turns of two tokens, two of an observation between them, whose log-ratio of 9 must not count."""
    mask, reference = t([[0, 0, 1, 1, 0, 0, 1, 1]]).bool(), t([[-1.0] * 8])
    logps = (reference + t([[0, 0, 0.2, -0.1, 9, 9, 0.3, -0.2]])).requires_grad_()
    values = t([[9, 9, 0.4, 9, 9, 9, 0.7, 9]]).requires_grad_()
    batch = TokenBatch(
        mask,
        logps,
        ref_logps=reference,
        values=values,
        rewards=t([1.0]),
        steps=torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]]),
    )
    policy = oreo(level="turn", kl_reg=0.0).loss(batch)["policy"].value
    assert policy.item() == pytest.approx(0.15625, abs=1e-9)
    (gradient,) = torch.autograd.grad(policy, logps)
    torch.testing.assert_close(gradient, t([[0, 0, -0.25, -0.25, 0, 0, -0.125, -0.125]]))
