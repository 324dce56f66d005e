"""Direct Advantage Policy Optimization, the step-level method (arXiv 2412.18279), not ByteDance's DAPO.

A critic V(s) = sigmoid(logit) is the probability that the reference policy ends right from s. The advantage of a step
a at s is V(s after a) - V(s), with the true reward in place of V after the last step, and the policy's log-ratio of a
step is regressed on it. All (B, S), see `oreo.by_step`.
"""

from __future__ import annotations

from posttrain.lazy import Tensor, functional, torch
from posttrain.objectives.oreo import Steps


def critic_losses(steps: Steps, outcomes: Tensor) -> Tensor:
    """Cross-entropy of every state of a trace with its outcome (section 3.1); 0 where no step is.

    The loss is linear in the target, so that single outcomes have the gradient of the mean over completions of a state.

    Args:
        outcomes: (B,) in [0, 1].
    """
    targets = outcomes.unsqueeze(1).expand_as(steps.values)
    losses = functional.binary_cross_entropy_with_logits(steps.values, targets, reduction="none")
    return torch.where(steps.exists, losses, torch.zeros_like(losses))


def step_advantages(steps: Steps, outcomes: Tensor) -> Tensor:
    """V(s after a) - V(s) without gradient; the outcome stands in for V after the last step. 0 where no step is."""
    values = steps.values.detach().sigmoid()
    more = functional.pad(steps.exists[:, 1:], (0, 1), value=False)
    after = torch.where(more, functional.pad(values[:, 1:], (0, 1)), outcomes.unsqueeze(1))
    return torch.where(steps.exists, after - values, torch.zeros_like(values))


def advantage_regression(ratios: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """Half of (A / beta - sum of the step's log-ratios)^2 (eq. 9), elementwise; zero at pi = pi_ref exp(A / beta)."""
    return 0.5 * (advantages / beta - ratios) ** 2
