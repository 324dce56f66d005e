"""ArCHer: critics of whole utterances, and the policy gradient within one (arXiv 2402.19446).

Q1, Q2(o, a) and V1, V2(o) are heads of one critic, o the conversation before a turn and a the turn. V is read before
the turn's first token; Q before its last one, which ends a turn and says nothing more. (B, S) below: a column for each
turn of a row, 0 where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.lazy import Tensor, torch
from posttrain.objectives.aggregation import masked


@dataclass(frozen=True, slots=True)
class TurnPlaces:
    """Where the turns of rows are; (B, S) each.

    Attributes:
        exists: bool.
        first, last: columns of the first and of the last token of each turn.
    """

    exists: Tensor
    first: Tensor
    last: Tensor

    def before(self, values: Tensor) -> Tensor:
        """(B, S) of values (B, T): those of the states before the turns."""
        return masked(values.gather(1, self.first), self.exists)

    def at_end(self, values: Tensor) -> Tensor:
        """(B, S) of values (B, T): those of the states before the turns' last tokens."""
        return masked(values.gather(1, self.last), self.exists)

    def sums(self, values: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
        """(B, S) of values (B, T): over the tokens of each turn, by the mask and steps that the turns are of."""
        sums = values.new_zeros(self.exists.shape)
        return sums.scatter_add(1, torch.where(mask, steps, torch.zeros_like(steps)), masked(values, mask))


def turns_of(mask: Tensor, steps: Tensor) -> TurnPlaces:
    """The turns of rows.

    Args:
        mask: (B, T) bool.
        steps: (B, T) int, the turn of each token under the mask.
    """
    width = mask.size(1)
    n = int(torch.where(mask, steps, torch.zeros_like(steps)).max()) + 1 if mask.numel() else 1
    of = torch.where(mask, steps, torch.full_like(steps, n))  # a turn more, which takes all other tokens
    places = torch.arange(width, device=mask.device).expand_as(of)
    first = places.new_full((len(mask), n + 1), width).scatter_reduce(1, of, places, "amin")[:, :n]
    last = places.new_full((len(mask), n + 1), -1).scatter_reduce(1, of, places, "amax")[:, :n]
    return TurnPlaces(last >= 0, first.clamp(max=width - 1), last.clamp(min=0))


def q_targets(rewards: Tensor, after: Tensor, discount: float) -> Tensor:
    """r + gamma V(o'), with V(o') 0 where the episode has ended."""
    return rewards + discount * after


def squared_errors(values: Tensor, targets: Tensor, exists: Tensor) -> Tensor:
    """(values - targets)^2 elementwise, 0 where there is no turn; the targets get no gradient."""
    return masked((values - targets.detach()) ** 2, exists)


def expectile_errors(values: Tensor, targets: Tensor, exists: Tensor, expectile: float) -> Tensor:
    """|expectile - 1[targets < values]| (targets - values)^2 elementwise, 0 where there is no turn.

    Source: IQL, arXiv 2110.06169, equation 5. The targets get no gradient. With an expectile near 1 values come near
    the best of the targets.
    """
    apart = targets.detach() - values
    squares = apart**2
    return masked(torch.where(apart > 0, expectile * squares, (1 - expectile) * squares), exists)


def utterance_advantages(q: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> Tensor:
    """min(Q1, Q2) - min(V1, V2), without gradient."""
    return torch.minimum(*q).detach() - torch.minimum(*v).detach()


def actor_losses(logps: Tensor, advantages: Tensor, mask: Tensor, baseline: Tensor | None = None) -> Tensor:
    """(B,) of -sum over the tokens of an utterance of (A - b_t) log p_t: REINFORCE within it.

    Args:
        logps, mask: (B, T).
        advantages: (B,).
        baseline: (B, T) b of the state before each token; gets no gradient. None: 0.
    """
    weights = advantages.unsqueeze(1) - (0.0 if baseline is None else baseline.detach())
    return -masked(weights * logps, mask).sum(dim=1)


def weighted_imitation(logps: Tensor, advantages: Tensor, exists: Tensor, inverse_temperature: float) -> Tensor:
    """-exp(inverse_temperature A) log p of recorded turns, 0 where there is none: advantage-weighted regression.

    Args:
        logps: (B, S) of whole turns.
        advantages: (B, S); they get no gradient.
        exists: (B, S) bool.
        inverse_temperature: in units of 1 / reward.
    """
    return -masked(torch.exp(inverse_temperature * advantages.detach()) * logps, exists)


def baseline_errors(baseline: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T) of (A - b_t)^2, 0 outside of the mask."""
    return masked((baseline - advantages.unsqueeze(1)) ** 2, mask)
