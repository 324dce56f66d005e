"""How large a model is, as compute is counted."""

from __future__ import annotations

from transformers import PreTrainedModel


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product: all but the embedding table, which is only looked up.

    A tied table counts once, as the LM head.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return total if head is not None and head.weight is table else total - table.numel()
