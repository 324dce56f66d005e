"""Credit for the turns of an episode: what came after an action, compared with the others who got as far.

Returns-to-go are centred, never rewards: who has reached turn k is settled before its action k, so the mean over them
leaves the gradient unbiased. Rewards centred turn by turn and then summed would pay for every further turn.
"""

from __future__ import annotations

from typing import Any

from posttrain.lazy import Tensor, torch
from posttrain.objectives.advantages import Baseline, Scale, group_advantages


def returns_to_go(rewards: Tensor, discount: float) -> Tensor:
    """G_k = r_k + discount * G_(k+1), (N, K).

    Args:
        rewards: (N, K), 0 behind the last turn of a row.
        discount: per turn.
    """
    returns = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    for turn in reversed(range(rewards.size(1))):
        carry = rewards[:, turn] + discount * carry
        returns[:, turn] = carry
    return returns


def turn_advantages(
    returns: Tensor,
    turns: Tensor,
    groups: Tensor,
    known: Tensor,
    *,
    baseline: Baseline,
    scale: Scale,
    eps: float = 1e-4,
) -> Tensor:
    """Advantages of turns, (N, K): `group_advantages` among the rows of a group that have that turn; 0 elsewhere.

    A turn that one row alone has reached gets 0.

    Args:
        returns: (N, K).
        turns: (N,) turns of each row.
        groups, known: (N,), as of `group_advantages`.
        baseline, scale, eps: as of `group_advantages`; `batch` is over all turns.
    """
    rows, width = returns.shape
    number = torch.arange(width, device=returns.device)
    reached = (number < turns.unsqueeze(1)) & known.unsqueeze(1)
    apart = groups.unsqueeze(1) * width + number
    how: dict[str, Any] = {"baseline": baseline, "scale": scale, "eps": eps}
    flat = group_advantages(returns.flatten(), apart.flatten(), reached.flatten(), **how)
    return flat.view(rows, width)


def over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """A value of each turn as one of each token, (B, T): the k-th run of tokens under the mask is turn k.

    Args:
        values: (B, K).
        mask: (B, T) bool, with at most K runs in a row; 0 outside of it.
    """
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    turn = (begins.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.where(mask, values.gather(1, turn), torch.zeros((), dtype=values.dtype))
