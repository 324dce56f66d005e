"""Preference losses against values derived by hand from the papers' formulas, in float64."""

import math

import pytest
import torch

from posttrain.objectives.divergences import divergence_score
from posttrain.objectives.preference import (
    asft_loss,
    brain_loss,
    cpl_loss,
    cpl_rank_loss,
    dpo_loss,
    log_odds,
    logistic_loss,
    orpo_loss,
    simpo_loss,
    srpo_losses,
    tpo_loss,
)

LN2 = 0.693147180560


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def gradients(loss, *inputs):
    """Value of the summed loss and its derivatives with respect to one-element inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves).sum()
    return [float(value.detach()), *(g.flatten().tolist() for g in torch.autograd.grad(value, leaves))]


def near(expected):
    return pytest.approx(expected, abs=1e-11)


# ---------------------------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize(
    ("loss", "beta", "label_smoothing", "expected"),
    [
        ("sigmoid", 0.1, 0.0, 0.620957047790),
        ("conservative", 0.1, 0.1, 0.635957047790),
        ("robust", 0.1, 0.1, 0.602207047790),
        ("hinge", 0.1, 0.0, 0.85),
        ("ipo", 0.1, 0.0, 12.25),
        ("sigmoid", 0.05, 0.0, 0.656350140827),
    ],
)
def test_dpo_of_a_margin_of_one_and_a_half(loss, beta, label_smoothing, expected):
    # s_w = -10, s_l = -12, r_w = -11, r_l = -11.5
    score_w, score_l = t(-10.0) - t(-11.0), t(-12.0) - t(-11.5)
    assert float(dpo_loss(score_w, score_l, beta, loss, label_smoothing)) == near(expected)


def test_dpo_gradient():
    value, (grad_w,), (grad_l,) = gradients(lambda w, r: dpo_loss(w + 11, r + 11.5, 0.1), t(-10.0), t(-12.0))
    assert value == near(0.620957047790)
    assert (grad_w, grad_l) == (near(-0.046257015466), near(0.046257015466))


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("loss", ["sigmoid", "conservative", "robust"])
def test_at_the_reference_the_loss_is_ln_2(beta, loss):
    # Robust: [(1 - e) ln 2 - e ln 2] / (1 - 2e) is ln 2 again.
    assert float(dpo_loss(t(0.0), t(0.0), beta, loss, 0.2)) == near(LN2)


@pytest.mark.parametrize(("margin", "expected"), [(-2000.0, 1000.0), (-30.0, 15.000000305902), (2000.0, 0.0)])
def test_dpo_is_stable_at_large_margins(margin, expected):
    value, (grad,) = gradients(lambda m: dpo_loss(m, torch.zeros_like(m), 0.5), t(margin))
    assert value == near(expected)
    assert grad == pytest.approx(-0.5 / (1 + math.exp(0.5 * margin)) if margin < 0 else 0.0, abs=1e-12)


def test_conservative_needs_no_more_than_the_label_noise():
    """Its minimum is where sigmoid(z) = 1 - e; there the gradient is 0."""
    z = t(math.log(0.9 / 0.1)).requires_grad_()
    (grad,) = torch.autograd.grad(logistic_loss(z, 0.1).sum(), z)
    assert float(grad) == near(0.0)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"score_w.*\(1,\).*score_l.*\(2,\)"):
        dpo_loss(t(1.0), t(1.0, 2.0), 0.1)
    with pytest.raises(ValueError, match="2 dimension"):
        brain_loss(t(1.0), t(1.0), t(1.0), 1.0)


# -------------------------------------------------------------------------------------------------------------- SimPO


def test_simpo():
    value, (grad_w,), (grad_l,) = gradients(
        lambda w, r: simpo_loss(w / 4, r / 2, 2.0, 1.0), t(-8.0), t(-6.0)
    )  # z = 2 (-2 + 3) - 1 = 1
    assert value == near(0.313261687518)
    assert (grad_w, grad_l) == (near(-0.134470710685), near(0.268941421370))
    _, (grad_mean,), _ = gradients(lambda w, r: simpo_loss(w, r, 2.0, 1.0), t(-2.0), t(-3.0))
    assert grad_mean == near(-0.537882842740)


def test_simpo_of_equal_means_is_softplus_of_the_margin():
    value, (grad_w,), (grad_l,) = gradients(lambda w, r: simpo_loss(w / 4, r / 2, 2.0, 1.0), t(-8.0), t(-4.0))
    assert value == near(1.313261687518)
    assert (grad_w, grad_l) == (near(-0.365529289315), near(0.731058578630))


def test_simpo_takes_means_and_the_margin_itself():
    assert float(simpo_loss(t(-8.0), t(-6.0), 2.0, 1.0)) == near(5.006715348489)  # sums in the place of means
    gap = (t(-2.0), t(-3.0))
    assert float(simpo_loss(*gap, 2.5, 0.55)) == near(0.133021075073)  # the ratio in the place of gamma
    assert float(simpo_loss(*gap, 2.5, 2.5 * 0.55)) == near(0.281150136248)


def test_simpo_hinge_and_smoothing():
    assert float(simpo_loss(t(-2.0), t(-3.0), 2.0, 1.5, loss="hinge")) == near(0.5)
    assert float(simpo_loss(t(-2.0), t(-3.0), 2.0, 1.0, 0.1)) == near(0.313261687518 + 0.1)  # + e z


# ---------------------------------------------------------------------------------------------------------- ASFT, TPO


def test_asft():
    means = (t(-0.5), t(-1.0))
    assert [float(log_odds(a)) for a in means] == [near(0.432752129567), near(-0.541324854613)]
    value, (grad_w,), (grad_l,) = gradients(lambda w, r: asft_loss(w, r, 1.0), *means)
    assert value == near(1.458675145387)
    assert (grad_w, grad_l) == (near(-2.0), near(0.581976706869))
    assert float(asft_loss(*means, 0.25)) == near(0.739668786347)
    assert float(asft_loss(*means, 1.0, b=0.5) + means[0]) == near(1.157745511786)
    closed = -2 * means[0] - torch.log1p(-torch.exp(means[1]))
    assert float(asft_loss(*means, 1.0)) == near(float(closed))
    # ORPO on the same odds is smaller: one contrast in the place of two absolute terms.
    orpo = -means[0] + logistic_loss(log_odds(means[0]) - log_odds(means[1]))
    assert float(orpo) == near(0.820299785238) and float(orpo) < float(asft_loss(*means, 1.0))


def test_orpo():
    value, (grad_w,), (grad_l,) = gradients(lambda w, r: 0.1 * orpo_loss(w, r), t(-0.5), t(-0.8))
    assert (value, grad_w, grad_l) == (near(0.042483276741), near(-0.087966415340), near(0.062854381574))
    assert float(log_odds(t(-0.5)) - log_odds(t(-0.8))) == near(0.636134450378)
    weight = 1 / (1 + math.exp(0.636134450378))  # sigmoid of minus the log odds ratio
    assert grad_w == near(-0.1 * weight / (1 - math.exp(-0.5)))


def test_orpo_of_a_certain_completion_has_no_gradient_and_is_finite():
    value, (grad_w,), (grad_l,) = gradients(lambda w, r: orpo_loss(w, r), t(-1e-9), t(-0.8))
    assert grad_w == 0 and 0 < grad_l < 1e-4 and 0 < value < 1e-4


def test_asft_stays_finite_where_a_completion_is_certain():
    for dtype in (torch.float32, torch.float64):
        means = [torch.tensor([0.0, -1e-8, -1e-3], dtype=dtype).requires_grad_() for _ in range(2)]
        losses = asft_loss(*means, 1.0)
        grads = torch.autograd.grad(losses.sum(), means)
        assert losses.isfinite().all() and all(g.isfinite().all() for g in grads)
        assert losses[0] > losses[2] > 0


def test_tpo():
    assert float(tpo_loss(t(-10.0), t(-12.0), 0.1)) == near(0.598138869382)
    assert float(tpo_loss(t(-10.0), t(-12.0), 0.1)) + 0.9 * 1.5 == near(1.948138869382)
    tpo_l = float(simpo_loss(t(-10.0) / 5, t(-12.0) / 4, 2.0, 0.5))
    assert tpo_l == near(0.201413277983) and tpo_l + 1.5 == near(1.701413277983)
    # With a scale this small the margin is all there is: the gap of 1 nat per token hardly enters.
    assert float(simpo_loss(t(-2.0), t(-3.0), 0.01, 0.5)) == near(0.967864150606)


# ------------------------------------------------------------------------------------------------------- CPL and SRPO


@pytest.mark.parametrize(
    ("lam", "preference", "expected"),
    [
        (1.0, 1.0, 0.313261687518),
        (0.5, 1.0, 0.974076984180),
        (0.5, 0.0, 2.126928011043),
        (0.5, 0.5, 1.550502497612),
    ],
)
def test_cpl(lam, preference, expected):
    # The second segment, of log-prob -20, is the better one; the first has -30; alpha = 0.1.
    better, worse = 0.1 * t(-20.0), 0.1 * t(-30.0)
    assert float(cpl_loss(better, worse, lam, preference)) == near(expected)


def test_cpl_with_a_bias_depends_on_a_common_shift():
    shifted = (t(-12.0), t(-13.0))
    assert float(cpl_loss(*shifted, 1.0)) == near(0.313261687518)
    assert float(cpl_loss(*shifted, 0.5)) == near(5.504078443271)


def test_cpl_rank():
    advantages, scores = t(-1.0, -3.0, -2.5).unsqueeze(0), t(2.0, 0.0, 1.0).unsqueeze(0)
    total, pairs = cpl_rank_loss(advantages, scores, 0.5)
    assert float(pairs) == 3
    assert float(total) == near(1.313261687518 + 0.474076984180 + 0.575939419879)
    assert float(total / pairs) == near(0.787759363859)


def test_cpl_rank_leaves_ties_out():
    advantages = t(-1.0, -3.0, -2.5).unsqueeze(0)
    total, pairs = cpl_rank_loss(advantages, t(1.0, 0.0, 1.0).unsqueeze(0), 0.5)
    expected = cpl_loss(t(-1.0), t(-3.0), 0.5) + cpl_loss(t(-2.5), t(-3.0), 0.5)
    assert float(pairs) == 2 and float(total) == near(float(expected))
    total, pairs = cpl_rank_loss(advantages, torch.zeros_like(advantages), 0.5)
    assert float(pairs) == 0 and float(total) == 0


@pytest.mark.parametrize(
    ("ratios", "beta", "generator", "reviser", "total"),
    [
        ((0.0,) * 6, 0.1, 1.0, 0.5, 0.6),
        ((1.0, -0.5, 2.0, 0.5, 0.2, -0.8), 0.1, 0.3249, 0.2825, 0.29098),
    ],
)
def test_srpo(ratios, beta, generator, reviser, total):
    found = srpo_losses(*(t(ratio) for ratio in ratios), beta)
    assert [float(x) for x in found] == [near(generator), near(reviser)]
    assert 0.2 * float(found[0]) + 0.8 * float(found[1]) == near(total)


def test_srpo_losses_are_0_in_expectation_of_their_residuals_at_the_optimum():
    """The closed-form optimum of the min-max game on three answers makes both regressions exact."""
    p = torch.tensor([[0.5, 0.8, 0.6], [0.2, 0.5, 0.7], [0.4, 0.3, 0.5]], dtype=torch.float64)  # row beats column
    ref, beta = t(0.5, 0.3, 0.2), 0.5
    # rho_reviser[y, z] = log pi(y | z) / ref(y): the reviser is tilted by the chance to beat z.
    tilted = ref.unsqueeze(1) * torch.exp(p / beta)
    log_reviser = (tilted / tilted.sum(0)).log() - ref.log().unsqueeze(1)
    policy = ref * log_reviser.diagonal().exp()
    policy = policy / policy.sum()
    assert policy.tolist() == [near(0.612424327707), near(0.226295653928), near(0.161280018365)]
    rho = policy.log() - ref.log()
    for y in range(3):
        for z in range(3):
            # The label is drawn with probability p; the squared loss is smallest at the mean of the labels.
            reviser = beta * (log_reviser[y, z] - log_reviser[z, z])
            assert float(reviser) == near(float(p[y, z]) - 0.5)
            generator = beta * (log_reviser[y, z] + rho[y] - log_reviser[z, y] - rho[z])
            assert float(generator) == near(2 * float(p[y, z]) - 1)


# -------------------------------------------------------------------------------------------------------------- BRAIn


def test_brain_from_the_prior():
    logps = t(-2.5, -2.5, -4.5).unsqueeze(0).requires_grad_()
    prior, rewards = t(-2.0, -3.0, -4.0).unsqueeze(0), t(1.0, 0.0, -1.0).unsqueeze(0)
    loss, target, policy = brain_loss(logps, prior, rewards, 1.0)
    assert target[0].tolist() == [near(0.665240955775), near(0.244728471055), near(0.090030573170)]
    assert policy[0].tolist() == [near(0.211941557617), near(0.576116884766), near(0.211941557617)]
    assert float(loss.detach()) == near(0.474320661037)
    cross_entropy = loss.detach() - (target * target.log()).sum()
    assert float(cross_entropy) == near(1.306716242877)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert grad[0].tolist() == [near(-0.453299398158), near(0.331388413711), near(0.121910984447)]


def test_brain_with_a_certain_target_is_dpo():
    logps, prior = t(-9.0, -13.0).unsqueeze(0), t(-10.0, -12.0).unsqueeze(0)
    loss, target, _ = brain_loss(logps, prior, t(1000.0, 0.0).unsqueeze(0), 1.0)
    assert target[0].tolist() == [1.0, 0.0]
    assert float(loss) == near(0.126928011043)
    assert float(loss) == near(float(dpo_loss(t(1.0), t(-1.0), 1.0)))


def test_brain_from_another_proposal():
    logps, prior = t(-2.5, -2.5, -4.5).unsqueeze(0), t(-2.0, -3.0, -4.0).unsqueeze(0)
    rewards, proposal = t(1.0, 0.0, -1.0).unsqueeze(0), t(-3.0, -2.0, -4.0).unsqueeze(0)
    loss, target, policy = brain_loss(logps, prior, rewards, 1.0, proposal)
    assert target[0].tolist() == [near(0.909442998513), near(0.045278500744), near(0.045278500744)]
    assert policy[0].tolist() == [near(0.576116884766), near(0.211941557617), near(0.211941557617)]
    assert float(loss) == near(0.275407754537)


# ---------------------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize(
    "loss",
    [
        *(lambda w, r, kind=kind: dpo_loss(w, r, 0.3, kind, 0.2) for kind in ("sigmoid", "conservative", "robust")),
        lambda w, r: dpo_loss(w, r, 0.3, "ipo"),
        lambda w, r: dpo_loss(w, r, 0.3, "hinge"),
        lambda w, r: dpo_loss(divergence_score(w, "forward_kl"), divergence_score(r, "forward_kl"), 0.3),
        lambda w, r: dpo_loss(divergence_score(w, "js"), divergence_score(r, "js"), 0.3),
        lambda w, r: dpo_loss(divergence_score(w, "alpha", 0.3), divergence_score(r, "alpha", 0.3), 0.3),
        lambda w, r: simpo_loss(w, r, 2.0, 0.5, 0.1),
        lambda w, r: simpo_loss(w, r, 0.7, 0.5, loss="hinge"),
        lambda w, r: asft_loss(-w.abs(), -r.abs(), 0.5, 0.7),
        lambda w, r: tpo_loss(w, r, 0.2),
        lambda w, r: cpl_loss(w, r, 0.5, 0.7),
        lambda w, r: cpl_rank_loss(torch.stack([w, r], 1), t(1.0, 2.0).expand(w.numel(), 2), 0.5)[0],
        lambda w, r: sum(srpo_losses(w, r, 2 * w, w - r, r, 0.5 * r, 0.1)),
        lambda w, r: brain_loss(torch.stack([w, r], 1), torch.zeros(2, 2).double(), torch.eye(2).double(), 0.7)[0],
    ],
)
def test_gradcheck(loss):
    inputs = (t(-1.3, 0.4).requires_grad_(), t(-2.2, 0.9).requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
