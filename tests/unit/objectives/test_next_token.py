"""Divergences of next-token distributions against hand-computed values in float64, and against TRL's own functions."""

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from posttrain.objectives.distillation import teacher_advantages
from posttrain.objectives.next_token import generalised_jsd, on_support, reverse_kl


def t(values):
    return torch.tensor(values, dtype=torch.float64)


P, Q = t([[0.7, 0.2, 0.1]]), t([[0.5, 0.3, 0.2]])
P4, Q4 = t([[0.55, 0.25, 0.15, 0.05]]), t([[0.40, 0.10, 0.20, 0.30]])
STUDENT, TEACHER = t([[1.0, 0.0, -1.0, -2.0]]), t([[0.5, 1.5, -1.0, -3.0]])


@pytest.mark.parametrize(
    ("beta", "value", "gradient"),
    [
        (0, 0.085122825957, [-0.2, 0.1, 0.1]),
        (0.1, 0.007694687676, None),
        (0.5, 0.021901178968, [-0.050848414981, 0.024187418049, 0.026660996932]),
        (0.9, 0.008184755843, None),
        (1, 0.092032850234, [-0.214252543428, 0.094029677362, 0.120222866065]),
    ],
)
def test_generalised_jsd(beta, value, gradient):
    logits = Q.log().requires_grad_()
    found = generalised_jsd(logits.log_softmax(-1), P.log(), beta)
    assert found.item() == pytest.approx(value, abs=1e-11)
    found.sum().backward()
    if gradient is not None:
        torch.testing.assert_close(logits.grad, t([gradient]), rtol=0, atol=1e-11)


def test_the_ends_are_no_limits_of_what_lies_between():
    assert generalised_jsd(Q.log(), P.log(), 0.001).item() / 0.001 == pytest.approx(0.085041158603, abs=1e-9)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_on_one_batch_it_is_trls_gkd_loss(beta):
    """Logits, labels with gaps, and the same number of tokens to divide by: value and gradient are TRL's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 6, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, 6, generator=generator) < 0.6
    theirs, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    labels = torch.where(mask, 1, -100)
    expected = GKDTrainer.generalized_jsd_loss(
        theirs, teacher, labels=labels, beta=beta, num_items_in_batch=int(mask.sum())
    )
    found = generalised_jsd(ours[mask].log_softmax(-1), teacher[mask].log_softmax(-1), beta).sum() / mask.sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    expected.backward()
    found.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("support", "tail", "reverse", "forward"),
    [
        ("teacher", False, 0.031982497976, 0.035274164609),
        ("teacher", True, 0.239134800302, 0.220964088709),
        ("policy", False, 0.431772674917, 0.296753310917),
        ("policy", True, 0.323841726585, 0.200634407635),
    ],
)
def test_the_two_likeliest_tokens_with_and_without_the_rest(support, tail, reverse, forward):
    reduced = on_support(Q4.log(), P4.log(), 2, support, tail=tail)
    assert generalised_jsd(*reduced, 1).item() == pytest.approx(reverse, abs=1e-11)
    assert generalised_jsd(*reduced, 0).item() == pytest.approx(forward, abs=1e-11)
    whole = (0.376053689624, 0.271481950755)
    assert generalised_jsd(Q4.log(), P4.log(), 1).item() == pytest.approx(whole[0], abs=1e-11)
    assert not tail or (reverse <= whole[0] and forward <= whole[1])


@pytest.mark.parametrize(
    ("beta", "tail", "value", "gradient"),
    [
        (0, False, 0.462117157260, None),
        (0.5, False, 0.110944071672, None),
        (1, False, 0.462117157260, [0.393223866483, -0.393223866483, 0, 0]),
        (0, True, 0.449881974618, None),
        (0.5, True, 0.105388282389, None),
        (1, True, 0.427826118891, [0.329140366007, -0.352681662266, 0.017210066582, 0.006331229677]),
    ],
)
def test_gradients_on_the_policys_two_likeliest(beta, tail, value, gradient):
    logits = STUDENT.clone().requires_grad_()
    reduced = on_support(logits.log_softmax(-1), TEACHER.log_softmax(-1), 2, "policy", tail=tail)
    found = generalised_jsd(*reduced, beta)
    assert found.item() == pytest.approx(value, abs=1e-11)
    found.sum().backward()
    if gradient is not None:
        torch.testing.assert_close(logits.grad, t([gradient]), rtol=0, atol=1e-11)


def test_as_many_tokens_as_there_are_change_nothing():
    assert on_support(Q.log(), P.log(), 3, "teacher", tail=True)[0].shape == (1, 3)


def test_the_policy_gradient_of_later_tokens_too_is_that_of_the_sequences_kl():
    """Two tokens of two, every completion weighed by its probability: discount 1 is exact, 0 has another sign."""
    logits = t([[0.2, -0.1], [0.4, 0.0], [-0.3, 0.1]])  # of the first token, of the second behind 0, and behind 1
    teacher = t([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)

    def logps(z, first, second):
        rows = z.log_softmax(-1)
        return torch.stack([rows[0, first], rows[1 + first, second]]).unsqueeze(0)

    exact = logits.clone().requires_grad_()
    pairs = [(a, b) for a in (0, 1) for b in (0, 1)]
    frozen = {pair: torch.stack([teacher[0, pair[0]], teacher[1 + pair[0], pair[1]]]).unsqueeze(0) for pair in pairs}
    kl = sum((own := logps(exact, *pair)).sum().exp() * (own - frozen[pair]).sum() for pair in pairs)
    kl.backward()
    assert kl.item() == pytest.approx(0.226577107323, abs=1e-11)
    for discount, first in ((1.0, 0.024980744773), (0.0, -0.025781822270)):
        z = logits.clone().requires_grad_()
        for pair in pairs:
            own = logps(z, *pair)
            advantages = teacher_advantages(own.detach(), frozen[pair], mask, discount)
            (-(advantages * own).sum() * own.detach().sum().exp()).backward()
        assert z.grad[0, 0].item() == pytest.approx(first, abs=1e-11)
        torch.testing.assert_close(z.grad[1:], exact.grad[1:], rtol=0, atol=1e-11)
        assert torch.allclose(z.grad[0], exact.grad[0]) == (discount == 1.0)


def test_teacher_advantages():
    old, teacher = t([[-0.5, -2.0, -0.1]]), t([[-0.3, -0.5, -3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(teacher_advantages(old, teacher, mask, 0.5), t([[0.225, 0.05, -2.9]]))
    torch.testing.assert_close(teacher_advantages(old, teacher, mask, 0.0), teacher - old)


def test_one_sample_estimates_that_are_differentiated_are_no_reverse_kl():
    """The expected gradient over the policy's tokens: k1's is 0, k3's is that of the forward KL."""
    found = {"k1": torch.zeros(3), "k3": torch.zeros(3), "advantage": torch.zeros(3)}
    for token in range(3):
        for name in found:
            z = Q.log().squeeze(0).clone().requires_grad_()
            s, teacher = z.log_softmax(0)[token], P.log()[0, token]
            ratio = {"k1": s - teacher, "k3": (teacher - s).exp() - (teacher - s) - 1}
            mask = torch.ones(1, 1, dtype=torch.bool)
            a = teacher_advantages(s.detach().view(1, 1), teacher.view(1, 1), mask, 0.0).squeeze()
            (ratio[name] if name in ratio else -a * s).backward()
            found[name] = found[name] + Q[0, token] * z.grad
    torch.testing.assert_close(found["k1"], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found["k3"], t([-0.2, 0.1, 0.1]), rtol=0, atol=1e-12)
    reverse = Q.log().requires_grad_()
    reverse_kl(reverse.log_softmax(-1), P.log()).sum().backward()
    torch.testing.assert_close(found["advantage"], reverse.grad[0], rtol=0, atol=1e-12)
