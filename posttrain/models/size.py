"""How large a model is, as compute is counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter
from transformers import PretrainedConfig, PreTrainedModel

from posttrain.config.sights import patch_side, patches_of_vector
from posttrain.models.sharing import EYES
from posttrain.models.value import Critic
from posttrain.tracking.ledger import Looks, Size

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names that configs have for the experts of a layer, and for how many of them a token goes through."""


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product for a token: all but the embedding table, which is only looked up,
    and of the experts of a layer as many as a token goes through.

    A tied table counts once, as the LM head.
    """
    return size_of(model).parameters


def size_of(model: PreTrainedModel, *, without: Critic | None = None) -> Size:
    """The size of a causal LM or classifier, or of a trunk, by what of it takes part in a matrix product for a token.

    Args:
        model: with the adapter that it is trained with, if it has one.
        without: a critic within the model, which is left out.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    looked_up = [] if head is not None and head.weight is table else [table]
    eyes = getattr(model, EYES, None)
    beside = [] if eyes is None else eyes.looking_parameters(model)
    left_out = {id(each) for each in (*looked_up, *beside, *(() if without is None else without.parameters()))}
    counted = [(name, each) for name, each in model.named_parameters() if id(each) not in left_out]
    found = _size(counted, model.config.get_text_config())
    return found if eyes is None else replace(found, looks=_looks(eyes, model))


def _looks(eyes: Any, model: PreTrainedModel) -> Looks:
    """What of a model of text and pictures looks at them."""
    config = model.config.to_dict()
    counts = {f"{part}{trained}": 0 for part in ("tower", "projector") for trained in ("", "_trained")}
    for part, parameter in eyes.looking_parts(model):
        n = elements(parameter)
        counts[part] += n
        counts[f"{part}_trained"] += n if parameter.requires_grad else 0
    return Looks(patch_side(config), patches_of_vector(config), **counts)


def critic_size(critic: Critic) -> Size:
    """The size of a critic: backbone and head, or the head alone where the trunk is the policy's."""
    found = _size(critic.head.named_parameters(), critic.config.get_text_config())
    if not critic.separate:
        return Size(found.parameters, found.trained, head_only=True)
    backbone = size_of(critic.backbone)
    return Size(backbone.parameters + found.parameters, backbone.trained + found.trained, looks=backbone.looks)


def _size(parameters: Iterable[tuple[str, Parameter]], config: PretrainedConfig) -> Size:
    experts, chosen = _experts(config)
    total = trained = 0
    for name, parameter in parameters:
        if ".original_module." in name:  # PEFT keeps it beside the copy that it trains
            continue
        n = elements(parameter)
        if experts and _of_experts(name, parameter, experts):
            n -= n * (experts - chosen) // experts
        total += n
        trained += n if parameter.requires_grad else 0
    return Size(total, trained)


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
    """Elements of the whole tensor, also where ZeRO-3 has taken it apart and left none here, or where several of them
    are packed into a byte."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return packed.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
