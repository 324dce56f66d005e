"""The load-balancing loss of a mixture of experts, from the router logits of all layers.

Switch Transformers (arXiv 2101.03961), equations 4 to 6, in the form of Mixtral: k experts for each token, and all
layers counted together.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.lazy import Tensor, torch


def expert_counts(logits: Sequence[Tensor], weights: Tensor, top_k: int) -> Tensor:
    """How often each expert is among the k likeliest of a token, (L, E), without gradient.

    Args:
        logits: of each of L layers (N, E).
        weights: (N,) how often each token counts; 0 for padding.
        top_k: experts that a token goes to.
    """
    counts = []
    for layer in logits:
        chosen = layer.detach().topk(top_k, dim=-1).indices
        each = weights.to(layer.device, torch.float64)[:, None].expand_as(chosen)
        empty = torch.zeros(layer.size(-1), dtype=torch.float64, device=layer.device)
        counts.append(empty.index_add(0, chosen.flatten(), each.flatten()))
    return torch.stack([each.to(counts[0].device) for each in counts])


def probability_sums(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Router probabilities of each expert, (E,), summed over the tokens of all layers. Arguments as above."""
    total = None
    for layer in logits:
        likely = layer.to(torch.promote_types(layer.dtype, torch.float32)).softmax(-1)
        part = weights.to(likely) @ likely
        total = part if total is None else total + part.to(total.device)
    return total


def load_balancing_loss(counts: Tensor, probabilities: Tensor, routed: Tensor | float) -> Tensor:
    """E * sum_e f_e * P_e, which is k where all experts have the same share, and at most E.

    f_e is the mean number of times that a token goes to expert e, P_e its mean probability. Linear in the
    probabilities: of given counts, the sum over parts of a batch is that of the batch.

    Args:
        counts: (L, E) of the whole batch, from `expert_counts`.
        probabilities: (E,) of the batch or of a part, from `probability_sums`.
        routed: tokens of the whole batch, each counted in every layer.
    """
    share = counts.sum(0) / routed
    return counts.size(-1) * (share.to(probabilities) * probabilities).sum() / routed
