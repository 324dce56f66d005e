"""Pairs within groups of scored completions, and pair losses as advantages of whole completions.

The gradient of a pair loss L(t_w - t_l) in the scores t is a number for each of its two completions. With these numbers
fixed, sum_i -A_i log pi(y_i) with A_i = -dL/dt_i has the gradient of L, whatever micro-batches the two are in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from posttrain.lazy import Tensor, torch
from posttrain.objectives.preference import same_shape

Choice = Literal["extremes", "all"]


def group_pairs(rewards: Tensor, groups: Tensor, usable: Tensor, choice: Choice, margin: float = 0.0) -> Tensor:
    """(P, 2) int64: places of the better and the worse completion of each pair, by place of the better one.

    Args:
        rewards: (N,).
        groups: (N,) int; completions of one prompt share a number.
        usable: (N,) bool; others are in no pair.
        choice: `extremes` pairs the best of a group with its worst, the first of equal ones each; `all` every two.
        margin: rewards of a pair differ by more than 0 and by at least this.
    """
    same_shape(1, rewards=rewards, groups=groups, usable=usable)
    values = rewards.tolist()
    members: dict[int, list[int]] = {}
    for place, (group, kept) in enumerate(zip(groups.tolist(), usable.tolist(), strict=True)):
        if kept:
            members.setdefault(group, []).append(place)
    found: list[tuple[int, int]] = []
    for places in members.values():
        best, worst = max(places, key=values.__getitem__), min(places, key=values.__getitem__)
        drawn = [(best, worst)] if choice == "extremes" else [(i, j) for i in places for j in places]
        found += [(i, j) for i, j in drawn if values[i] > values[j] and values[i] - values[j] >= margin]
    return torch.tensor(sorted(found), dtype=torch.int64).reshape(-1, 2)


def group_shares(groups: Tensor) -> Tensor:
    """(N,) float64: one over the number of members of the same group, so that every group weighs 1."""
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    return 1.0 / sizes[index].double()


def contrasted(
    scores: Tensor, pairs: Tensor, shares: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses of the pairs, (P,), and A_i = -d(sum of shares times losses)/dt_i of all completions, (N,).

    Args:
        scores: t, (N,), such as log-ratios to the reference.
        pairs: (P, 2).
        shares: (P,) weights of the pairs.
        loss: of the scores of better and worse completions, (P,) each.
    """
    with torch.enable_grad():
        leaf = scores.detach().clone().requires_grad_()
        losses = loss(leaf[pairs[:, 0]], leaf[pairs[:, 1]])
        (slopes,) = torch.autograd.grad((shares.to(losses) * losses).sum(), leaf)
    return losses.detach(), -slopes


def win_shares(
    rewards: Tensor, groups: Tensor, own: Tensor, theirs: Tensor, preference: Literal["sigmoid", "better"]
) -> tuple[Tensor, Tensor]:
    """Mean probability with which each of one's completions is preferred to the opponent's of its prompt, (N,); and
    bool (N,): those of one's own that have an opponent, elsewhere the first is 0.

    Args:
        rewards: (N,); groups: (N,) int.
        own, theirs: (N,) bool.
        preference: `sigmoid` of the difference of rewards (Bradley and Terry); `better`: 1, 1/2 or 0 by its sign.
    """
    same_shape(1, rewards=rewards, groups=groups, own=own, theirs=theirs)
    differences = rewards[:, None] - rewards[None, :]
    wins = differences.sigmoid() if preference == "sigmoid" else (differences.sign() + 1) / 2
    met = own[:, None] & theirs[None, :] & (groups[:, None] == groups[None, :])
    n = met.sum(dim=1)
    return torch.where(met, wins, torch.zeros_like(wins)).sum(dim=1) / n.clamp(min=1), n > 0
