"""What is known of model types (`model_type` in config.json) before a model is loaded. Imports without torch.

A run does not rest on these tables but tries the model (`models.proof`, `rollouts.texts`). By them `posttrain check`
says beforehand what that will find. `tests/unit/models/test_causal_types.py` compares them with all types that
transformers can build.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from posttrain.config.locations import Locations
from posttrain.config.needs import Needs
from posttrain.config.positions import config_json
from posttrain.config.schema import Lora, Recipe
from posttrain.errors import ModelError, NeedsError

SHAREABLE = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "mixtral", "olmo2", "olmoe", "phi3"}
    | {"qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2"}
)
"""Types for which it is tested that a shared prompt can be computed once. Others run plain rows."""

SHAREABLE_PICTURES = frozenset({"gemma3", "idefics3", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"})
"""The same of types of text and pictures, loaded as such: a prompt with its pictures."""

AS_DECODER = frozenset(
    {"bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta"}
    | {"roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
"""Encoders: causal with `is_decoder: true` only. A layer of their own stands before the head."""

WHOLE_LOGITS = AS_DECODER | {"inkling_text", "modernbert-decoder", "recurrent_gemma", "xlstm"}
"""Types in which something else than the head, a factor and a cap stands between hidden states and logits."""

EQUAL_LENGTHS = frozenset(
    {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "git", "marian", "mbart", "mvp", "pegasus", "plbart"}
    | {"trocr", "whisper"}
)
"""Types whose prompts are read with others of equal length only: padding would move their positions."""

READ_AGAIN = frozenset(
    {"camembert", "data2vec-text", "deepseek_v4", "hrm_text", "minimax", "moshi", "openai-gpt", "recurrent_gemma"}
    | {"roberta", "roberta-prelayernorm", "rwkv", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlstm", "xmod"}
)
"""Types that are sampled from without a cache: they have none, or none that rows can be taken from."""

REFUSED = frozenset({"cpmant", "prophetnet", "reformer", "xlnet"})
"""Types whose log-probs cannot be had from token ids alone, or that read tokens behind the one that they predict."""


BALANCED = frozenset(
    {"deepseek_v4", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid"}
    | {"granitemoeshared", "jamba", "jetmoe", "laguna", "mellum", "minimax", "minimax_m2", "minimax_m3_vl_text"}
    | {"mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"}
)
"""Types (of the text model) whose routers have a load-balancing loss of their own, which ours is."""

FUSED_EXPERTS = frozenset(
    {"afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe"}
    | {"flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash"}
    | {"mellum", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe"}
    | {"qwen3_omni_moe_thinker", "solar_open"}
)
"""Types of whose experts PEFT adapts the one tensor that they are in memory, by the names that they have in files."""

OF_MIXTRAL = frozenset({"minimax", "minimax_m2", "mixtral"})
"""Those of them whose experts have Mixtral's names in files, w1 to w3; others have gate_proj, up_proj and down_proj."""

NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names in files of a router and of the layers of an expert."""

TOGETHER = (("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of an expert that are one tensor in memory."""

PAST_ADAPTERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h"), ("conv1d", "out_proj")),
    **dict.fromkeys(("falcon_mamba", "mamba"), ("conv1d", "dt_proj", "out_proj")),
    "jamba": ("dt_proj",),
    "longcat_flash": ("classifier",),
}
"""Layers, by type, whose weights are read past an adapter, which would not be trained. PEFT refuses some of them."""


def router_coefficient(asked: float | None, config: Mapping[str, Any]) -> float:
    """What the load-balancing loss of a mixture of experts is multiplied with; 0 where it is not trained.

    Args:
        asked: by the recipe; None leaves it to the model.
        config: of the text model.
    """
    if asked is not None:
        return asked
    return float(config.get("router_aux_loss_coef") or 0.0) if config.get("output_router_logits") else 0.0


def router_note(asked: float | None, config: Mapping[str, Any]) -> str | None:
    """What to know of a load-balancing loss that is not trained though the config weighs one; None otherwise.

    Arguments as in `router_coefficient`.
    """
    weight = config.get("router_aux_loss_coef")
    if not weight or asked is not None or router_coefficient(asked, config):
        return None
    note = f"the router's load-balancing loss (router_aux_loss_coef {weight}) is not part of the training loss"
    return f"{note}; model.router_loss: {weight} adds it" if config.get("model_type") in BALANCED else note


def unbalanced_notes(recipe: Recipe, needs: Needs) -> list[str]:
    """What to know of a classifier or critic whose routers are trained without their load-balancing loss, which only
    policies are trained with; as far as files here tell."""
    if needs.classifier:
        trained, model = "classifier", recipe.model
    elif needs.critic and needs.trains != "policy" and (recipe.critic is None or recipe.critic.trunk == "separate"):
        path = None if recipe.critic is None else recipe.critic.path
        trained, model = "critic", recipe.model if path is None else recipe.model.of_folder(path)
    else:
        return []
    weight = _text(config_json(model) or {}).get("router_aux_loss_coef")
    return [f"the {trained}'s routers train without a load-balancing loss (router_aux_loss_coef {weight})"] * bool(
        weight
    )


def wrong_router_loss(recipe: Recipe, locations: Locations) -> Iterator[NeedsError]:
    """A load-balancing loss that the model's type does not have, as far as files here tell."""
    config = config_json(recipe.model) if recipe.model.router_loss else None
    if config is None or recipe.model.trust_remote_code:
        return
    kind = _text(config).get("model_type")
    if kind not in BALANCED:
        yield NeedsError(
            f"models of type {kind!r} have no load-balancing loss of routers",
            where=locations.where(("model", "router_loss")),
            hint="remove it; it is there for " + ", ".join(sorted(BALANCED)),
        )


def wrong_adapter_for_type(recipe: Recipe, locations: Locations) -> Iterator[NeedsError]:
    """What PEFT refuses for the model's type once it puts the adapter on it, as far as files here tell."""
    lora, section = recipe.model.peft, ("model", "peft")
    if lora is None:
        return
    kind = str((config_json(recipe.model) or {}).get("model_type"))
    named = () if isinstance(lora.target_modules, str) else [t.rpartition(".")[2] for t in lora.target_modules]
    for target in named:
        if target in PAST_ADAPTERS.get(kind, ()):
            yield NeedsError(
                f"models of type {kind!r} read the weights of {target} past an adapter",
                where=locations.where((*section, "target_modules")),
                hint="take it out, or set target_modules: all-linear, which leaves it out",
            )
    experts = [target for target in named if target in NAMES_OF_EXPERTS]
    if kind not in FUSED_EXPERTS or (named and not experts):
        return
    for one, other in TOGETHER:
        if (one in experts) != (other in experts):
            yield NeedsError(
                f"{one} and {other} of the experts are one tensor, which has one adapter",
                where=locations.where((*section, "target_modules")),
                hint="name both or none of them",
            )
    for key in ("dropout", "dora"):
        if getattr(lora, key):
            yield NeedsError(
                f"adapters of the experts, which are one tensor in models of type {kind!r}, have no {key}",
                where=locations.where((*section, key)),
                hint="leave it out, or name layers of attention only: target_modules: [q_proj, k_proj, v_proj, o_proj]",
            )


def without_adapter(kind: str, lora: Lora, names: Iterable[str]) -> list[str]:
    """Modules that get no adapter though they are asked for: layers called as those of experts, which PEFT looks for in
    the experts alone where these are one tensor.

    Args:
        kind: model type.
        lora: the adapter.
        names: of modules with weights, as in memory or in files.
    """
    if kind not in FUSED_EXPERTS:
        return []
    layers = set(NAMES_OF_EXPERTS[4:] if kind in OF_MIXTRAL else NAMES_OF_EXPERTS[1:4])
    if not isinstance(lora.target_modules, str):
        layers &= {target.rpartition(".")[2] for target in lora.target_modules}
    whole = tuple(f".{name}." for name in lora.modules_to_save or ())
    named = [name for name in names if name.rpartition(".")[2] in layers and ".experts." not in name]
    return sorted(name for name in named if not any(part in f".{name}." for part in whole))


def without_adapter_note(kind: str, lora: Lora | None, names: Iterable[str] | None) -> str | None:
    """What to know of them; None if there are none, or where the names are not known."""
    blocks: dict[str, set[int]] = {}
    for name in [] if lora is None else without_adapter(kind, lora, names or ()):
        layer, block = re.findall(r"\blayers\.(\d+)\.(.+)\.", name)[0]
        blocks.setdefault(block, set()).add(int(layer))
    if not blocks:
        return None
    first = [block if "." in block else f"layers.{min(layers)}.{block}" for block, layers in blocks.items()]
    where = [f"{block} in {len(layers)} layer{'s' if len(layers) > 1 else ''}" for block, layers in blocks.items()]
    return (
        f"no adapter on {' and '.join(where)}, which stay as in the start: in models of type {kind!r} PEFT gives these "
        f"names to experts alone; model.peft.modules_to_save, e.g. [{', '.join(first)}], trains such blocks whole"
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a config.json."""
    return config.get("text_config") or config


def forward_notes(
    config: Mapping[str, Any], *, classifier: bool, samples: bool, router_loss: float | None = None
) -> list[str]:
    """What a run will say of the model's type, one line each.

    Args:
        config: of config.json.
        classifier: whether a sequence classifier is trained.
        samples: whether the transformers engine samples from it.
        router_loss: of the recipe's model section.

    Raises:
        ModelError: a run would refuse the type.
    """
    kind = str(config.get("model_type"))
    notes: list[str] = []
    if classifier:
        return notes
    if kind in REFUSED or (kind in AS_DECODER and not config.get("is_decoder")):
        hint = "set `is_decoder: true` in its config.json if it was trained so" if kind in AS_DECODER else ""
        raise ModelError(
            f"models of type {kind!r} are no causal language models that score from token ids alone",
            where="model.path",
            hint=hint or "take a causal language model",
        )
    if router := router_note(router_loss, _text(config)):
        notes.append(router)
    if kind in WHOLE_LOGITS:
        notes.append(f"whole logits in training, vocabulary times tokens of a micro-batch, for type {kind!r}")
    if samples and kind in EQUAL_LENGTHS:
        notes.append(f"sampling from type {kind!r} reads only prompts of equal length at once")
    if samples and kind in READ_AGAIN:
        notes.append(f"sampling from type {kind!r} reads every row again for each token: slow; vLLM may know it")
    return notes
