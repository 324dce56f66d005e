"""Distillation on sampled tokens: the teacher's word on each token as an advantage."""

from __future__ import annotations

from posttrain.lazy import Tensor
from posttrain.objectives.returns import discounted_returns


def teacher_advantages(old_logps: Tensor, teacher_logps: Tensor, mask: Tensor, discount: float) -> Tensor:
    """A_t = sum over i >= t of discount^(i - t) (log p(y_i) - log q_old(y_i)), (B, T), 0 outside of `mask`.

    With discount 0 it is each token's own log-ratio; with 1 the expected policy gradient is that of the reverse KL of
    whole completions (MiniLLM, arXiv 2306.08543), which that of discount 0 is not, not even in sign. Without gradient.

    Args:
        old_logps: (B, T) log q_old, under the policy that sampled the tokens.
        teacher_logps: (B, T) log p, under the teacher, of the same tokens.
    """
    return discounted_returns((teacher_logps - old_logps).detach(), mask, discount)
