"""How large a model is, as compute is counted."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names that configs have for the experts of a layer, and for how many of them a token goes through."""


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product for a token: all but the embedding table, which is only looked up,
    and of the experts of a layer as many as a token goes through.

    A tied table counts once, as the LM head.
    """
    experts, chosen = _experts(model.config.get_text_config())
    total = spared = 0
    for name, parameter in model.named_parameters():
        n = elements(parameter)
        total += n
        if experts and _of_experts(name, parameter, experts):
            spared += n * (experts - chosen) // experts
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return total - spared if head is not None and head.weight is table else total - spared - elements(table)


def _experts(config: PretrainedConfig) -> tuple[int, int]:
    """Experts of a layer and how many of them a token goes through; 0 and 0 where there are none."""
    experts, chosen = (
        next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)
        for names in (EXPERTS, CHOSEN)
    )
    return (experts, chosen) if 0 < chosen < experts else (0, 0)


def _of_experts(name: str, parameter: torch.nn.Parameter, experts: int) -> bool:
    """Whether a parameter holds something of every expert of a layer, or is one expert's."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return "experts" in name.split(".") or (len(shape) == 3 and shape[0] == experts)


def elements(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole tensor, also where ZeRO-3 has taken it apart and left none here."""
    return getattr(parameter, "ds_numel", parameter.numel())
