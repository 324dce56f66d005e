"""Masked action spaces: the tokens that a mask model finds likely, and log-probs over those alone (NLPO).

q = the mask model's distribution in a state, C = the tokens allowed there. Logits (N, V), one row per state.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from posttrain.lazy import Tensor, torch


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How a method masks actions.

    Attributes:
        top_p: mass of the mask model that the allowed tokens reach.
        min_tokens: so many of its likeliest tokens are always allowed.
        update_interval: rollouts between copies of the policy into the mask model.
    """

    top_p: float
    min_tokens: int
    update_interval: int


@dataclass(frozen=True, slots=True)
class ActionMask:
    """A mask model that is the policy with other weights, as engine and trainer use it.

    Attributes:
        in_place: a context in which the policy has the mask model's weights.
        always: ids that are allowed in every state (special tokens).
    """

    in_place: Callable[[], AbstractContextManager]
    rule: MaskRule
    always: tuple[int, ...]

    def allowed(self, logits: Tensor) -> Tensor:
        """(N, V) bool from the mask model's logits."""
        found = nucleus(logits, self.rule.top_p, self.rule.min_tokens)
        found[:, list(self.always)] = True
        return found


def nucleus(logits: Tensor, top_p: float, min_tokens: int = 1) -> Tensor:
    """(N, V) bool: the smallest set of likeliest tokens whose mass reaches `top_p`, and at least `min_tokens` of them.

    Of equal logits the lower id counts as likelier. Source: NLPO, arXiv 2210.01241, section 4.3 (top-p, arXiv
    1904.09751); `min_tokens_to_keep` of the authors' code.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, index = exact.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    inside = probabilities.cumsum(-1) - probabilities < top_p
    inside[..., :min_tokens] = True
    return torch.zeros_like(inside).scatter(-1, index, inside)


def masked_logps(logits: Tensor, allowed: Tensor) -> Tensor:
    """Log-probs (N, V) of the policy renormalised over `allowed` (N, V) bool; -inf outside, without gradient there.

    log pi~(v) = log pi(v) - log sum over u in C of pi(u).
    """
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
