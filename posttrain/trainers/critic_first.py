"""Updates at the start of a run that train the critic alone (`Needs.critic_first`): the policy must not move at all.

A gradient of zero is not enough. Weight decay moves the weights all the same, and Adam counts the step. Without a
gradient an optimizer passes a tensor over, and neither happens. With a shared trunk the trunk is the policy's, so that
the value head alone is trained.
"""

from __future__ import annotations

import torch

from posttrain.config.needs import Needs
from posttrain.config.schema import CriticConfig, Recipe
from posttrain.errors import NeedsError
from posttrain.models.value import NAME as CRITIC


def drop_policy_gradients(model: torch.nn.Module) -> None:
    """Forget the gradients of all but the critic; call after every backward pass, so that clipping sees none either."""
    for name, parameter in model.named_parameters():
        if f".{CRITIC}." not in f".{name}":
            parameter.grad = None


def refuse_where_sharded(recipe: Recipe, needs: Needs) -> None:
    """DeepSpeed puts gradients into buffers of its own and makes the update right away, and FSDP2 reads no checkpoint
    that lacks the optimizer state of some tensors. So gradients stay there, as the zeros that the method makes them.

    Raises:
        NeedsError: zeros would not keep the policy as it is.
    """
    if needs.critic_first == 0:
        return
    if recipe.training.weight_decay > 0:
        raise NeedsError(
            "weight decay moves a policy that shall wait for its critic, and under DeepSpeed and FSDP2 it cannot be "
            "switched off for a part of the run",
            where="training.weight_decay",
            hint="set it to 0, or train with DDP (launch/accelerate/ddp.yaml), or leave the policy's waiting out",
        )
    if (recipe.critic or CriticConfig()).trunk == "shared":
        raise NeedsError(
            "the critic trains the trunk it shares with a policy that shall wait for it, and under DeepSpeed and FSDP2 "
            "the trunk's gradients cannot be left out",
            where="critic.trunk",
            hint="set it to separate, or train with DDP (launch/accelerate/ddp.yaml), or leave the policy's waiting "
            "out",
        )
