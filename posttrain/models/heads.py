"""Heads that give numbers instead of tokens: values and rewards, in float32 whatever their weights are in.

A score in bfloat16 has two digits. And where a group of trained tensors has several types, DeepSpeed raises all to the
largest: the head of a classifier in bfloat16 beside an adapter in float32, which hidden states in bfloat16 do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Head(nn.Linear):
    """A head whose product is in float32 at least, also under autocast and where an engine holds it in bfloat16."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., outputs) values of states (..., H)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(dtype), self.weight.to(dtype))


class Heads(Head):
    """Several value heads: one linear layer, each of whose outputs is computed as if it were alone.

    So values and gradients are bit for bit those of a critic with that head only, and a head that enters no loss gets a
    gradient of exactly 0. It is one parameter, so that nothing that wraps the policy sees one without a gradient.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """(heads, N) values of N states. Heads first: strided gradients would be summed up in another order."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        hidden, weight = hidden.to(dtype), self.weight.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.stack([nn.functional.linear(hidden, row).squeeze(-1) for row in weight.split(1)])


def keep_digits(classifier: PreTrainedModel) -> PreTrainedModel:
    """Make the head of a sequence classifier a `Head`, where it is linear without bias, as those of decoders are."""
    if type(getattr(classifier, "score", None)) is nn.Linear and classifier.score.bias is None:
        classifier.score = Head(classifier.score)
    return classifier
