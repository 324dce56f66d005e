"""Returns and advantages along the tokens of a completion, whitening, explained variance. Pure functions with masks.

All tensors are (B, T) aligned to tokens: values[i, t] is the value of the state before token t, rewards[i, t] what
token t earned. Tokens outside of the mask are no part of a trajectory: whatever stands between two trained tokens (a
turn of somebody else) is passed over, and after the last trained token the value is 0.
"""

from __future__ import annotations

from posttrain.lazy import Tensor, torch
from posttrain.objectives.aggregation import masked


def at_end(scores: Tensor, mask: Tensor) -> Tensor:
    """Token rewards (B, T) that are 0 but for `scores` (B,) at the last trained token of each row."""
    positions = torch.arange(1, mask.size(1) + 1, device=mask.device)
    last = (mask * positions).amax(dim=1, keepdim=True)
    here = (positions == last) & (last > 0)
    return masked(scores.unsqueeze(1).to(mask.device), here)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that a value model regresses on (arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}, return_t = A_t + V_t.

    Returns:
        (B, T) each, 0 outside of `mask`, without gradient.
    """
    rewards, values = masked(rewards, mask).detach(), masked(values, mask).detach()
    advantages = torch.zeros_like(values)
    following, carried = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(mask.size(1))):
        found = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * carried
        advantages[:, t] = torch.where(mask[:, t], found, torch.zeros_like(found))
        carried = torch.where(mask[:, t], found, carried)
        following = torch.where(mask[:, t], values[:, t], following)
    return advantages, masked(advantages + values, mask)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """R_t = r_t + gamma R_{t+1}, (B, T), 0 outside of `mask`."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[1]


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: number, sum and sum of squares of the values under `mask`; they add up over batches and ranks."""
    kept = masked(values, mask).double()
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def whiten(values: Tensor, mask: Tensor, of: Tensor, *, shift: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps) under `mask`, 0 elsewhere.

    Args:
        of: `moments` of all values that share a mean, also those of other micro-batches and ranks. The variance
            divides by n, as in the reference code of DR-PO.
        shift: False adds the mean again (rewards, whose sign means something).
    """
    mean, variance = _mean_and_variance(of)
    whitened = (values.double() - mean) * (variance + eps).rsqrt() + (0.0 if shift else mean)
    return masked(whitened.to(values.dtype), mask)


def _mean_and_variance(of: Tensor) -> tuple[Tensor, Tensor]:
    n, total, squares = of.unbind(-1)
    mean = total / n.clamp(min=1)
    return mean, (squares / n.clamp(min=1) - mean**2).clamp(min=0)


def explained_variance(residuals: Tensor, targets: Tensor) -> Tensor:
    """1 - Var(target - value) / Var(target), from `moments` of both: 1 is perfect, 0 no better than a constant,
    negative worse than one. 0 where the targets do not vary.

    Args:
        residuals, targets: (3,), or (H, 3) of values from H heads, whose variances are about means of their own.
    """
    rest, spread = _variance_within(residuals), _variance_within(targets)
    return torch.where(spread > 1e-12, 1 - rest / spread.clamp(min=1e-12), torch.zeros_like(spread))


def _variance_within(of: Tensor) -> Tensor:
    """The mean variance of some groups, each as large as it is; of one group its variance."""
    groups = of.reshape(-1, 3)
    _, variances = _mean_and_variance(groups)
    n = groups[:, 0]
    return (n * variances).sum() / n.sum().clamp(min=1)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Per token, half of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) (PPO as in arXiv 2203.02155's code).

    Args:
        clip: c; None is the plain squared error.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (near - returns) ** 2)
