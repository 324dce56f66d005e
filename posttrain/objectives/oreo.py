"""OREO: soft-Bellman path consistency of a value model and a policy on rewarded traces (arXiv 2412.16145).

Per token d = log pi - log pi_ref; a *step* is a run of tokens that is one action: a token, a line, or the response.
Per step k of a row: D_k = sum of d over the steps from k on, V_k = value of the state before the step, R = the row's
reward, e_k = V_k - R + beta D_k, which is 0 at every step of every trace at the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.lazy import Tensor, functional, torch
from posttrain.objectives.aggregation import masked


@dataclass(frozen=True, slots=True)
class Steps:
    """A row's steps side by side; (B, S) each, S of the row with the most.

    Attributes:
        exists: bool.
        ratios: sum of d over the step's own tokens, with gradient.
        later: the same over all steps behind it, without gradient.
        values: of the state before the step, with gradient.
    """

    exists: Tensor
    ratios: Tensor
    later: Tensor
    values: Tensor


def token_steps(mask: Tensor) -> Tensor:
    """(B, T) step numbers where every trained token is a step."""
    return mask.long().cumsum(dim=1).sub(1).clamp(min=0)


def response_steps(mask: Tensor) -> Tensor:
    """(B, T) step numbers where the response is one step."""
    return torch.zeros_like(mask, dtype=torch.long)


def by_step(logps: Tensor, ref_logps: Tensor, values: Tensor, mask: Tensor, steps: Tensor) -> Steps:
    """Sums over the tokens of each step.

    Args:
        logps, ref_logps, values, mask: (B, T).
        steps: (B, T) int, numbers from 0 without a gap over the trained tokens of a row.
    """
    steps = torch.where(mask, steps, torch.zeros_like(steps))
    n = int(steps.max()) + 1 if steps.numel() else 1
    zeros = logps.new_zeros(len(logps), n)
    ratios = zeros.scatter_add(1, steps, masked(logps - ref_logps, mask))
    exists = zeros.scatter_add(1, steps, mask.to(zeros.dtype)) > 0
    numbers = torch.where(mask, steps, torch.full_like(steps, -1)).cummax(dim=1).values
    first = mask & (steps > functional.pad(numbers[:, :-1], (1, 0), value=-1))
    own = torch.where(first, masked(values, mask), torch.zeros_like(values))
    detached = ratios.detach()
    later = detached.flip(1).cumsum(dim=1).flip(1) - detached
    return Steps(exists, ratios, later, zeros.scatter_add(1, steps, own))


def value_targets(steps: Steps, rewards: Tensor, beta: float) -> Tensor:
    """(B, S): R - beta D without gradient, the return of the soft-Bellman equation that V is fitted to."""
    return rewards.unsqueeze(1) - beta * (steps.ratios.detach() + steps.later)


def value_losses(steps: Steps, rewards: Tensor, beta: float) -> Tensor:
    """(B,) mean over a row's states of (V - R + beta sg(D))^2; 0 for a row without a step."""
    return _row_means((steps.values - value_targets(steps, rewards, beta)) ** 2, steps.exists)


def policy_losses(steps: Steps, rewards: Tensor, beta: float) -> Tensor:
    """(B,) mean over a row's states of (sg(V) - R + beta (own + sg(later)))^2.

    The gradient of a step's log-ratio uses the residual at its own state only; without the stop-gradients it would sum
    those of all states before it. With one step per row it is the response-level loss.
    """
    residuals = steps.values.detach() - rewards.unsqueeze(1) + beta * (steps.ratios + steps.later)
    return _row_means(residuals**2, steps.exists)


def one_step_losses(steps: Steps, rewards: Tensor, beta: float) -> Tensor:
    """(B,) mean over a row's states of (sg(V) - r - sg(V') + beta own)^2, V' the value after the step.

    The soft-Bellman equation of one step, `single_step_actor_loss` in the authors' code: r is the row's reward at the
    last step and 0 before, V' is 0 after the last.
    """
    values = steps.values.detach()
    more = functional.pad(steps.exists[:, 1:], (0, 1), value=False)
    after = torch.where(more, functional.pad(values[:, 1:], (0, 1)), rewards.unsqueeze(1))
    return _row_means((values - after + beta * steps.ratios) ** 2, steps.exists)


def _row_means(values: Tensor, exists: Tensor) -> Tensor:
    kept = torch.where(exists, values, torch.zeros_like(values))
    return kept.sum(dim=1) / exists.sum(dim=1).clamp(min=1)
