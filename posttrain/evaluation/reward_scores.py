"""Scores of preference pairs under language models and under a sequence classifier; one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.data.sample import Sample
from posttrain.models.collate import collate
from posttrain.models.token_logps import token_logps


@dataclass(frozen=True, slots=True)
class Implicit:
    """(N,) log-probs of N responses, summed over their tokens, in float64.

    Attributes:
        policy: under the policy.
        reference: under the reference.
        tokens: number of tokens, end token included.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor

    def scores(self) -> dict[str, Tensor]:
        """(N,) scores by name: the implicit reward over beta, the same per token, and what the policy alone says."""
        ratio = self.policy - self.reference
        return {
            "implicit": ratio,
            "implicit per token": ratio / self.tokens,
            "policy log-prob": self.policy,
            "policy log-prob per token": self.policy / self.tokens,
        }


def response_logps(model: PreTrainedModel, samples: Sequence[Sample], pad_id: int, batch_size: int) -> Tensor:
    """(N,) log-prob of each response, summed over its trained tokens, in float64.

    Args:
        model: a causal LM that went through `token_logps.prepare`.
        samples: token sequences.
        pad_id: of the tokenizer.
        batch_size: sequences per forward pass.
    """
    model.eval()

    def score(ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        return token_logps(model, ids, attention_mask, mask)[0].double().sum(dim=1)

    return _batched(score, samples, pad_id, batch_size, model.device)


def classifier_scores(model: PreTrainedModel, samples: Sequence[Sample], pad_id: int, batch_size: int) -> Tensor:
    """(N,) output of a sequence classifier for each whole sequence, in float64. Arguments as in `response_logps`."""
    model.eval()

    def score(ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=attention_mask).logits[:, 0].double()

    return _batched(score, samples, pad_id, batch_size, model.device)


@torch.no_grad()
def _batched(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    samples: Sequence[Sample],
    pad_id: int,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Sequences of about one length share a batch, so little is padding."""
    found = torch.zeros(len(samples), dtype=torch.float64)
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tensors = collate([samples[index] for index in chosen], pad_id)
        inputs = (tensors[name].to(device) for name in ("ids", "attention_mask", "mask"))
        found[chosen] = score(*inputs).cpu()
    return found
