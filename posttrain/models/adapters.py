"""LoRA adapters: a recipe's options as PEFT's, adapters to start from, and ends of the model that are tied.

`config.adapters` has what can be said before anything is loaded.
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import PreTrainedModel

from posttrain.config.adapters import WEIGHTS, matches, resolved
from posttrain.config.model_types import PAST_ADAPTERS
from posttrain.config.schema import Lora, ModelConfig
from posttrain.errors import ModelError, NeedsError
from posttrain.models.outline import is_outline

OF_PEFT = re.compile(r"(\.base_layer)+(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
"""What PEFT adds to the name of a tensor: of a module with adapters, and of one that is trained as a whole."""


def plain_name(name: str) -> str:
    """The name of a tensor in the model without its adapter."""
    return OF_PEFT.sub("", name)


def adapted_name(name: str, layer: LoraLayer) -> str:
    """Plain name of the weight that the adapter called `name` is added to; those of fused experts are nested."""
    leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return f"{plain_name(f'{name}.')}{leaf}"


def lora_config(config: Lora, *, classifier: bool = False) -> LoraConfig:
    """The recipe's adapter as a `peft.LoraConfig`; a classifier's head is trained whole beside it."""
    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha or 2 * config.r,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        use_rslora=config.rslora,
        use_dora=config.dora,
        modules_to_save=config.modules_to_save,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        bias=config.bias,
        layers_to_transform=config.layers_to_transform,
        init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
    )


def adapter_to_train(model: ModelConfig, *, classifier: bool = False) -> LoraConfig | None:
    """The adapter that a run trains: a new one, or the one it goes on with; None where it trains the weights."""
    if model.peft is not None:
        return lora_config(model.peft, classifier=classifier)
    folder = continued(model)
    if folder is None:
        return None
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def for_model(adapter: LoraConfig | None, model: PreTrainedModel) -> LoraConfig | None:
    """The adapter for a model: "all-linear" without layers that no adapter can stand on.

    Those are linear layers with a forward pass of their own (routers that return a choice beside the scores, grouped
    layers), and layers whose weights are read past the adapter.
    """
    if adapter is None or adapter.target_modules != "all-linear":
        return adapter
    left_out = set(PAST_ADAPTERS.get(model.config.model_type, ()))
    for name, module in model.named_modules():
        own = isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward
        if own and not type(module).__module__.startswith(("bitsandbytes.", "posttrain.")):
            left_out.add(name.rpartition(".")[2])
    adapter.exclude_modules = sorted(left_out) or None
    return adapter


def continued(model: ModelConfig) -> Path | None:
    """Folder of the adapter that is trained on, if there is one."""
    if not model.adapted or model.peft is not None:
        return None
    return Path(resolved(model).adapter.path).expanduser()


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the weights of an adapter folder into a model that has such an adapter.

    Raises:
        ModelError: its tensors are not those of the adapter, as with another base model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # into an outline
            found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except (RuntimeError, ValueError, KeyError) as error:
        raise _misfit(folder, str(error).strip().splitlines()[0]) from error
    missing = [name for name in found.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} has no place" for name in found.unexpected_keys]
    if wrong:
        raise _misfit(folder, wrong[0])


def _misfit(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit the model: {what}",
        where=str(folder),
        hint="take the base model that it was trained on",
    )


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter of a folder added to its weights, all of which can be trained.

    Raises:
        ModelError: the adapter does not fit, or holds numbers that are not finite.
    """
    config = PeftConfig.from_pretrained(str(folder))
    try:
        adapted = PeftModel(untied_for(model, config), config)
    except ValueError as error:
        raise _misfit(folder, str(error).strip().splitlines()[0]) from error
    load_adapter(adapted, folder)
    try:
        merged = adapted.merge_and_unload(safe_merge=not is_outline(model))  # there are no numbers to look at in one
    except ValueError as error:
        raise _misfit(folder, str(error).strip().splitlines()[0]) from error
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(True)


def untied_for(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    """The model, its head taken apart from its embeddings where the adapter changes one of the two.

    With one matrix for both, the adapter of one end would be another policy once it is merged.

    Raises:
        NeedsError: the matrix is sharded already.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:
        return model
    targets = [config.target_modules or [], list(config.modules_to_save or [])]
    targets = [each if isinstance(each, str) else list(each) for each in targets if each != "all-linear"]
    ends = [name for name, module in model.named_modules() if module is table or module is head]
    if not any(matches(each, name) for each in targets for name in ends):
        return model
    if hasattr(table.weight, "ds_id"):
        raise NeedsError(
            "an adapter on embeddings that are tied to the head takes them apart, and ZeRO-3 has sharded them",
            where="model.peft",
            hint="leave the embeddings out of the adapter, or use ZeRO stage 1 or 2",
        )
    head.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=table.weight.requires_grad)
    for section in (model.config, model.config.get_text_config()):
        section.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    return model


def frozen_start(model: PeftModel, *, share: bool) -> PeftModel:
    """A frozen copy of a policy with the adapter it starts from.

    Args:
        share: its base weights are the policy's own; not where they will be sharded.
    """
    kept = [*model.parameters(), *model.buffers()] if share else []
    memo = {id(tensor): tensor for tensor in kept if not tensor.requires_grad}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def adapter_hash(folder: Path) -> str:
    """SHA-256 of an adapter's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
