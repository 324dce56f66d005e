"""Log-probs over allowed tokens only, in tiles: the LM head where a mask model restricts the actions (NLPO).

Which tokens are allowed comes from another pass, with other weights in the same model. It is kept as one bit per token
of the vocabulary: N V / 8 bytes for N scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.models.scored_head import LogitMap, Scores, tile_rows
from posttrain.objectives.action_mask import ActionMask, masked_logps


@torch.no_grad()
def allowed_bits(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, logit_map: LogitMap, mask: ActionMask
) -> Tensor:
    """The allowed tokens at N states as bits, (N, ceil(V / 8)) uint8.

    A target is always allowed: the engine drew it, and at the edge of the set its rounding may differ from this pass.

    Args:
        head, hidden: of the mask model; hidden states (N, H) that predict `targets` (N,).
    """
    parts = []
    for inside in _tiles(head, hidden):
        allowed = mask.allowed(_logits(head, hidden[inside], logit_map))
        parts.append(_pack(allowed.scatter(-1, targets[inside, None], True)))
    return torch.cat(parts)


def masked_score(
    head: torch.nn.Module,
    hidden: Tensor,
    targets: Tensor,
    bits: Tensor,
    logit_map: LogitMap,
    *,
    entropy: bool,
    top1: bool,
) -> Scores:
    """As `scored_head.score`, of the policy renormalised over the allowed tokens. The backward calls the head again."""

    def tile(hidden: Tensor, targets: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = _logits(head, hidden, logit_map)
        allowed = _unpack(bits, logits.shape[-1])
        logps = masked_logps(logits, allowed)
        with torch.no_grad():
            finite = logps.masked_fill(~allowed, 0.0)
            entropies = -(finite.exp() * finite * allowed).sum(-1)
            likeliest = (logps.argmax(-1) == targets).to(logps.dtype)
        return logps.gather(-1, targets[:, None]).squeeze(-1), entropies, likeliest

    tiles = [
        checkpoint(tile, hidden[inside], targets[inside], bits[inside], use_reentrant=False)
        for inside in _tiles(head, hidden)
    ]
    logps, entropies, likeliest = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    return Scores(logps, entropies if entropy else None, likeliest if top1 else None)


def _logits(head: torch.nn.Module, hidden: Tensor, logit_map: LogitMap) -> Tensor:
    raw = head(hidden)
    return logit_map(raw.to(torch.promote_types(raw.dtype, torch.float32)))


def _tiles(head: torch.nn.Module, hidden: Tensor) -> list[slice]:
    width = getattr(head, "out_features", None) or hidden.shape[-1]
    rows = tile_rows(width, torch.float32, hidden.device)
    return [slice(start, start + rows) for start in range(0, max(len(hidden), 1), rows)]


def _places(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, device=device, dtype=torch.uint8)


def _pack(allowed: Tensor) -> Tensor:
    grown = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (grown * _places(allowed.device)).sum(-1, dtype=torch.uint8)


def _unpack(bits: Tensor, width: int) -> Tensor:
    return (bits.unsqueeze(-1) & _places(bits.device)).bool().flatten(-2)[:, :width]
