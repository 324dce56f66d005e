"""How large a model is, as compute is counted."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product: all but the embedding table, which is only looked up.

    A tied table counts once, as the LM head.
    """
    total = sum(map(elements, model.parameters()))
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return total if head is not None and head.weight is table else total - elements(table)


def elements(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole tensor, also where ZeRO-3 has taken it apart and left none here."""
    return getattr(parameter, "ds_numel", parameter.numel())
