"""Losses of reward models, from the two scores of a pair. Shapes: all (B,)."""

from __future__ import annotations

from posttrain.lazy import Tensor, functional


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center: float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - m) + center (r_w + r_l)^2 per pair, (B,).

    The first term is the likelihood of the preference under Bradley and Terry (1952), as in arXiv 2409.03650; with a
    margin m as in arXiv 2307.09288 and TRL's `margin` column. It does not change if both scores move together; the
    second term holds their mean near 0 (TRL's `center_rewards_coefficient`).

    Args:
        chosen, rejected: (B,) scores r_w, r_l.
        margin: (B,) m, how far apart the scores should be at least.
        center: weight of the second term.
    """
    difference = chosen - rejected
    losses = -functional.logsigmoid(difference if margin is None else difference - margin)
    return losses + center * (chosen + rejected) ** 2 if center else losses
