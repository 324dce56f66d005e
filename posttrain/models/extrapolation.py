"""A model beyond another one: the step between two models, taken a part further.

Accelerated preference optimisation (arXiv 2410.06293) does so after each round of iterative DPO, as Nesterov's momentum
does between gradient steps: pi_next is proportional to pi (pi / pi_before)^alpha. In weights, which it is here, this is
theta + alpha (theta - theta_before); the two agree where log-probs are linear in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.models.loading import load_policy
from posttrain.models.saving import SavePlan, start_dtype


def extrapolated(model: Mapping[str, Tensor], before: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """model + alpha (model - before), tensor by tensor; with alpha 0 the model itself, bit for bit.

    Args:
        model, before: name -> tensor, in a type with digits enough for their difference: float32.

    Raises:
        ModelError: they have other tensors.
    """
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (model, before)]
    if shapes[0] != shapes[1]:
        names = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ModelError(
            f"the two models differ in {', '.join(names[:3])}",
            where="previous",
            hint="give the model that this one was trained from, or that of the round before",
        )
    return {name: tensor + alpha * (tensor - before[name]) for name, tensor in model.items()}


def write_extrapolated(model: str, previous: str, alpha: float, folder: Path) -> None:
    """Write the extrapolated model into a folder that is there, in the type that `model` is stored in.

    Args:
        model: folder or Hub id.
        previous: of the round before.
        alpha: how much further.

    Raises:
        ModelError: one of them cannot be loaded, or they have other tensors.
    """
    config = ModelConfig(path=model)
    policy, tokenizer = load_policy(config, seed=0)
    before, _ = load_policy(config.of_folder(previous), seed=0)
    plan = SavePlan.of(config.model_copy(update={"save_dtype": start_dtype(config) or "float32"}), policy, tokenizer)
    found = extrapolated(dict(policy.named_parameters()), dict(before.named_parameters()), alpha)
    state = {name: tensor.detach().to(plan.saved_type(name, tensor, policy)) for name, tensor in found.items()}
    saved = set(policy.state_dict())
    state |= {name: buffer for name, buffer in policy.named_buffers() if name in saved}
    plan.write(folder, policy, state)
