"""Group-relative advantages from rewards. Rows whose outcome is unknown are left out of every statistic and get 0."""

from __future__ import annotations

from typing import Literal

from posttrain.lazy import Tensor, torch

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none", "mean", "tokens"]


def group_statistics(values: Tensor, groups: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: the value minus the mean of its group, the group's standard deviation (ddof 1) and its size; each (N,).

    Only known rows enter; the first result is 0 for the others. The deviation of fewer than two rows is 0.

    Args:
        values: (N,); groups: (N,) non-negative int; known: (N,) bool.
    """
    weights = known.to(values.dtype)
    n_groups = int(groups.max()) + 1 if groups.numel() else 0
    zeros = values.new_zeros(n_groups)
    sizes = zeros.index_add(0, groups, weights)
    # Measured from the group's smallest value: equal rewards then give exactly 0, which a rounded mean would not.
    lowest = zeros.scatter_reduce(0, groups[known], values[known], "amin", include_self=False)
    above = torch.where(known, values - lowest[groups], torch.zeros_like(values))
    means = zeros.index_add(0, groups, above) / sizes.clamp(min=1)
    centred = torch.where(known, above - means[groups], torch.zeros_like(values))
    deviations = (zeros.index_add(0, groups, centred**2) / (sizes - 1).clamp(min=1)).sqrt()
    return centred, deviations[groups], sizes[groups]


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    known: Tensor,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
) -> Tensor:
    """Advantages of completions against others of the same prompt, (N,).

    - baseline `mean`: r - mean of the group (GRPO); `leave_one_out`: r - mean of the group's other rows
      (RLOO, arXiv 2402.14740), which is the former times n / (n - 1).
    - scale `group`: divided by the group's deviation + eps (GRPO, arXiv 2402.03300); `batch`: by the deviation of all
      rewards + eps (Lite PPO, arXiv 2508.08221); `none` (Dr. GRPO, arXiv 2503.20783).
    - scale `mean`: divided by the group's mean reward, 0 where that is not above 0 (MaxRL, arXiv 2602.02710). With
      rewards 0 and 1 and a group of n it estimates the gradient of -sum over k <= n of (1 - p)^k / k, but that groups
      that are all wrong get 0 in place of -1: a bias of -p (1 - p)^n.
    - scale `tokens`: mean 0 and variance 1 over the trained tokens of all rows, each with its row's advantage
      (REINFORCE++ with the group's mean as baseline, arXiv 2501.03262).

    A row alone in its group has nothing to be compared with: 0.

    Args:
        rewards: (N,) over all ranks, since `batch` is a statistic of the whole step.
        eps: added to the deviation; 1e-4 as in TRL, so that values can be compared.
        lengths: (N,) trained tokens, for `tokens`.
    """
    advantages, deviations, sizes = group_statistics(rewards, groups, known)
    if baseline == "leave_one_out":
        advantages = advantages * sizes / (sizes - 1).clamp(min=1)
    if scale == "group":
        advantages = advantages / (deviations + eps)
    elif scale == "batch":
        spread = rewards[known].std() if int(known.sum()) > 1 else rewards.new_zeros(())
        advantages = advantages / (spread + eps)
    elif scale == "mean":
        means = torch.where(known, rewards, torch.zeros_like(rewards)) - advantages
        advantages = torch.where(means > 0, advantages / means.clamp(min=eps), torch.zeros_like(advantages))
    elif scale == "tokens":
        weights = torch.where(known, lengths, torch.zeros_like(lengths)).to(rewards.dtype)
        total = weights.sum().clamp(min=1)
        centred = advantages - (weights * advantages).sum() / total
        deviation = ((weights * centred**2).sum() / total).sqrt()
        advantages = torch.where(known, centred / (deviation + eps), torch.zeros_like(centred))
    return advantages


def informative_groups(rewards: Tensor, groups: Tensor, known: Tensor) -> tuple[int, int]:
    """Number of groups whose known rewards differ, and number of groups."""
    _, deviations, _ = group_statistics(rewards, groups, known)
    differing = set(groups[deviations > 0].tolist())
    return len(differing), len(set(groups.tolist()))
