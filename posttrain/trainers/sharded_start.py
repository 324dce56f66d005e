"""Starting where ranks share out the weights (FSDP2, ZeRO-3): one rank reads them, the others are given their part.

The main rank loads every model whole, and does with it whatever needs numbers: proofs, hashes, adapters, copies. The
others have outlines of the same models (`models.outline`). When a model is taken apart, each tensor is sent from the
main rank, cut, and let go. So no other rank ever holds more than its part and the two tensors of which one comes while
the other goes, or with FSDP2 one layer; all have the main rank's values bit for bit, whatever a rank would have drawn
for itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config
from transformers.integrations.deepspeed import set_hf_deepspeed_config

from posttrain.config.schema import Recipe
from posttrain.errors import NeedsError
from posttrain.models.outline import outlined
from posttrain.models.proof import MARK, prove_scoring
from posttrain.trainers.ranks import on_main_rank, with_main_rank

T = TypeVar("T")


def shares_out(ranks: PartialState) -> str | None:
    """Name of what will share out the weights over these ranks, by the launcher's settings; None if nothing will."""
    return _launched_with(ranks) if ranks.num_processes > 1 else None


def _launched_with(ranks: PartialState) -> str | None:
    """The same on one rank too. Asked before there is an `Accelerator`, which starts DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # On a CPU accelerate trains with DDP instead; version 1 is refused once the trainer is there.
        on_cpu = ranks.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
        return "FSDP2" if not on_cpu and os.environ.get("FSDP_VERSION", "1") == "2" else None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and _zero_stage() == 3:
        return "ZeRO-3"
    return None


def _zero_stage() -> int:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def refuse_quantised(recipe: Recipe, ranks: PartialState) -> None:
    """Packed weights cannot be taken apart over the ranks.

    Raises:
        NeedsError: they would be.
    """
    sharded = _launched_with(ranks)
    if recipe.model.quantization is not None and sharded is not None:
        raise NeedsError(
            f"{sharded} shards weights over the ranks, and these are packed in few bits",
            where="model.quantization",
            hint="use DDP or ZeRO stage 1 or 2, or leave quantization out",
        )


@contextmanager
def read_by_one_rank(ranks: PartialState) -> Iterator[None]:
    """Models loaded within are whole on the main rank alone, where ranks share out the weights."""
    with outlined(shares_out(ranks) is not None and not ranks.is_main_process):
        yield


def loaded(ranks: PartialState, make: Callable[[], T]) -> T:
    """What `make` loads; where ranks share out the weights, an error of the main rank is that of all."""
    return make() if shares_out(ranks) is None else with_main_rank(ranks, make)


def of_the_weights(ranks: PartialState, find: Callable[[], T]) -> T:
    """What `find` reads off whole weights: on the main rank for all where ranks share them out, else on each rank."""
    return find() if shares_out(ranks) is None else on_main_rank(ranks, find)


def proven(model: PreTrainedModel, ranks: PartialState) -> None:
    """Before a causal model is made ready for scoring: the main rank's proof of it on all ranks."""
    if shares_out(ranks) is not None:
        setattr(model, MARK, on_main_rank(ranks, lambda: prove_scoring(model)))


@contextmanager
def never_taken_apart(arguments: Any) -> Iterator[None]:
    """Models loaded within are not taken apart by transformers, which under ZeRO-3 reads them whole on every rank.

    Args:
        arguments: of the Trainer.
    """
    active = getattr(arguments, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            set_hf_deepspeed_config(active)


# ------------------------------------------------------------------------------------------- from the main rank to all


@torch.no_grad()
def from_main(tensor: Tensor, device: torch.device) -> Tensor:
    """The main rank's values of a tensor, on the device where ranks send; the others' own are not looked at."""
    if PartialState().is_main_process:
        sent = tensor.detach().to(device).contiguous()
    else:
        sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if sent.numel():
        torch.distributed.broadcast(sent.view(-1).view(torch.uint8), 0)
    return sent


def share_buffers(model: nn.Module, device: torch.device) -> None:
    """Give all ranks the main rank's buffers, which nobody takes apart; also those that no checkpoint holds."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = from_main(buffer, device)


def fill(model: nn.Module, device: torch.device) -> None:
    """Make a model whole on every rank, on a device, with the main rank's weights."""
    share_buffers(model, device)
    _replace(model, lambda parameter: nn.Parameter(from_main(parameter, device), parameter.requires_grad))


def _replace(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put another parameter in the place of each; of a tied one once, and tied."""
    known: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in known:
                known[id(parameter)] = parameter, make(parameter)  # kept, so that no other takes its id
            module._parameters[name] = known[id(parameter)][1]


def take_apart_by_zero3(model: nn.Module, settings: dict[str, Any]) -> None:
    """Take a model apart as DeepSpeed does at its start, but one tensor after the other: there, it would put the whole
    model on the accelerator first.

    Args:
        model: whole on the main rank.
        settings: DeepSpeed's, as it will be started with.
    """
    import deepspeed

    deepspeed.init_distributed()  # what is already there; before, it would take the settings for those of one rank
    main, halves = PartialState().is_main_process, {"bf16": torch.bfloat16, "fp16": torch.float16}
    chosen = [dtype for name, dtype in halves.items() if settings.get(name, {}).get("enabled") is True]
    convert: Callable[..., None] | None = None

    def apart(parameter: nn.Parameter) -> nn.Parameter:
        nonlocal convert
        dtype = chosen[0] if chosen and parameter.is_floating_point() else parameter.dtype
        if main:
            parameter.data = parameter.data.to(dtype)
        else:
            empty = torch.empty(parameter.shape, dtype=dtype)
            parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        if convert is None:
            first = nn.Module()
            first.register_parameter("weight", parameter)
            deepspeed.zero.Init(module=first, config_dict_or_path=settings)
            convert = parameter.convert_to_zero_parameters
        else:
            convert(param_list=[parameter])  # sends the main rank's values before it cuts them
        return parameter

    _replace(model, apart)
