"""Weights of a checkpoint put back into the policy that wrote it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from posttrain.errors import StateError
from posttrain.models.value import split_state


def put_back(policy: PreTrainedModel, folder: Path) -> None:
    """Give a policy the weights in a folder that `save_pretrained` wrote of it; its critic keeps its own.

    transformers reads them: for many types (mixtures of experts, wrappers of several models) the file has other names,
    and one tensor for several, than the model in memory has.

    Raises:
        StateError: a weight is missing, has another shape, or is not the policy's.
    """
    kinds = {parameter.dtype for parameter in policy.parameters() if parameter.is_floating_point()}
    try:
        read, found = type(policy).from_pretrained(
            folder,
            config=copy.deepcopy(policy.config),
            dtype=kinds.pop() if len(kinds) == 1 else torch.float32,  # which holds every number of smaller types
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise StateError(f"the weights cannot be read: {str(error).strip()}", where=str(folder)) from error
    wrong = {name for kind in ("missing_keys", "unexpected_keys") for name in found[kind]}
    wrong |= {name for name, *_ in found["mismatched_keys"]}
    own, weights = split_state(policy.state_dict())[0], read.state_dict()
    wrong |= set(own) ^ set(weights)
    if wrong:
        names = ", ".join(sorted(wrong)[:3])
        raise StateError(
            f"{len(wrong)} tensors are missing or are not the policy's: {names}",
            where=str(folder),
            hint="resume with the package versions that wrote the checkpoint (its run folder's environment.json)",
        )
    policy.load_state_dict(weights, strict=False)  # the critic is not among them
