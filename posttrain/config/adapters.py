"""Adapters in a recipe, before anything is loaded: folders to start from, and options that cannot work.

Imports without torch and PEFT: names of modules are read from the headers of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.config.foreign_files import read_header, read_json, refuse_links
from posttrain.config.locations import Locations
from posttrain.config.locations import Path as KeyPath
from posttrain.config.needs import Needs
from posttrain.config.patterns import find
from posttrain.config.schema import AdapterStart, Lora, ModelConfig, Recipe
from posttrain.errors import ModelError, NeedsError, StackError, nearest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter folder, by PEFT's names."""

MAX_RANK = 65_536

NAME_MODULES = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
"""Settings of an adapter that name modules, or patterns of their names; of the last two the keys do."""

HEADS = ("lm_head", "embed_out", "output_layer")
"""Names of the output layer of a language model."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear modules of a layer of the models that `model.init` makes."""


def resolved(model: ModelConfig) -> ModelConfig:
    """The same section with `path` a whole model, and an adapter to start from as `adapter`.

    Raises:
        ModelError: an adapter folder that is none, whose base is unknown, or that is a whole model too; or a link leads
            out of one of the folders.
    """
    found = _resolved(model)
    for path in (found.path, None if found.adapter is None else found.adapter.path):
        if path is not None:
            refuse_links(Path(path).expanduser())
    return found


def _resolved(model: ModelConfig) -> ModelConfig:
    if model.path is None:
        return model
    folder = Path(model.path).expanduser()
    whole = (folder / "config.json").is_file() and any(
        not file.name.startswith("adapter_") for file in folder.glob("*.safetensors")
    )
    mine, given = (folder / CONFIG).is_file(), None if model.adapter is None else model.adapter.path
    if mine and whole:
        raise ModelError(
            f"{model.path!r} holds a whole model and an adapter, and transformers would load both as one",
            where="model.path",
            hint="move adapter_config.json and adapter_model.safetensors into a folder of their own, and start from it "
            "with model.adapter.path if the adapter is meant",
        )
    if given is not None:
        if mine:
            raise ModelError(
                f"{model.path!r} is an adapter and no whole model", where="model.path", hint="give its base model"
            )
        _check_adapter(Path(given).expanduser(), "model.adapter.path")
        return model
    if not mine:
        if model.adapter is not None:
            raise ModelError(
                f"{model.path!r} is no adapter folder: it has no {CONFIG}",
                where="model.path",
                hint="name the adapter's folder as model.adapter.path",
            )
        return model
    _check_adapter(folder, "model.path")
    base = adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{model.path!r} does not say which model it was trained on",
            where="model.path",
            hint="give that model as model.path and this folder as model.adapter.path",
        )
    mode = "merge" if model.adapter is None else model.adapter.mode
    return model.model_copy(
        update={"path": base, "revision": None, "adapter": AdapterStart(path=model.path, mode=mode)}
    )


def adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        ModelError: it is no JSON object.
    """
    return read_json(folder / CONFIG)


def trained_lora(model: ModelConfig) -> Lora | None:
    """What is known of the adapter that a run trains: the recipe's, or rank and modules of the one it goes on with."""
    if model.peft is not None or not model.adapted:
        return model.peft
    start = resolved(model).adapter
    assert start is not None and start.path is not None  # `resolved` has filled it in
    given = adapter_config(Path(start.path).expanduser())
    targets = given.get("target_modules")
    return Lora(r=given["r"], target_modules=targets if isinstance(targets, list) else "all-linear")


def saves_head(model: ModelConfig) -> bool:
    """Whether a run trains an LM head of its own beside an adapter."""
    saved = None if model.peft is None else model.peft.modules_to_save
    return any(name.rpartition(".")[2] in HEADS for name in saved or ())


def _check_adapter(folder: Path, where: str) -> None:
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{str(folder)!r} is no adapter folder: it has no {CONFIG}", where=where, hint="`hf download` gets one here"
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{str(folder)!r} holds no {WEIGHTS}; pickled weights are not loaded",
            where=where,
            hint="load it with PEFT and save it again with save_pretrained",
        )
    given = adapter_config(folder)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{str(folder)!r} is an adapter of type {kind}; only LoRA can be started from", where=where)
    _refuse_settings(given, str(folder / CONFIG))


def _refuse_settings(given: dict[str, Any], where: str) -> None:
    """Refuse settings of an adapter by which PEFT would import a module of their choice, or match without end.

    Raises:
        ModelError: names the key.
    """
    if given.get("megatron_config") is not None:
        raise ModelError("megatron_config has PEFT import a module that the adapter names", where=where)
    rank = given.get("r")
    if not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
        raise ModelError(f"r must be a whole number from 1 to {MAX_RANK:,}, not {str(rank)[:20]}", where=where)
    for key in NAME_MODULES:
        found = given.get(key) or []
        for pattern in (found,) if isinstance(found, str) else tuple(found) if isinstance(found, list | dict) else (0,):
            if not isinstance(pattern, str):
                raise ModelError(f"{key} must name modules", where=where)
            if takes_long(pattern):
                raise ModelError(
                    f"{key}: the pattern {pattern[:60]!r} may take exponential time",
                    where=where,
                    hint="name the modules, or write a pattern without repeated groups and with few repetitions",
                )


def takes_long(pattern: str) -> bool:
    """Whether a pattern may try very many ways on the name of a module; PEFT matches it without a clock."""
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "a", re.sub(r"\\.", "a", pattern, flags=re.DOTALL))
    ways, open_groups = 2 ** len(re.findall(r"(?<![(*+?}])\?", plain)), [1]
    for sign in re.findall(r"[()|]", plain):
        if sign == "(":
            open_groups.append(1)
        elif sign == "|":
            open_groups[-1] += 1
        elif len(open_groups) > 1:
            ways *= open_groups.pop()
    return bool(re.search(r"\)[*+{]", plain)) or len(re.findall(r"[*+{]", plain)) > 5 or ways > 100_000


def matches(targets: Sequence[str] | str, name: str) -> bool:
    """Whether a dotted module name is among PEFT's targets: a list of endings, or a pattern for the whole name."""
    if isinstance(targets, str):
        return any(find(rf"\A(?:{targets})\Z", name, where="target_modules"))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def module_names(model: ModelConfig) -> list[str] | None:
    """Dotted names of the modules with weights; None where the weights are not in a folder here."""
    if model.init is not None:
        linears = [f"self_attn.{name}" for name in LINEARS[:4]] + [f"mlp.{name}" for name in LINEARS[4:]]
        layers = [f"model.layers.{n}.{linear}" for n in range(model.init.layers) for linear in linears]
        return ["model.embed_tokens", *layers, "model.norm", "lm_head"]
    names: set[str] = set()
    for file in Path(str(model.path)).expanduser().glob("*.safetensors"):
        if not file.name.startswith("adapter_"):
            names |= {name.rpartition(".")[0] for name in read_header(file)[1] if name != "__metadata__"}
    return sorted(names) or None


def wrong_adapters(recipe: Recipe, needs: Needs, locations: Locations) -> Iterator[NeedsError | StackError]:
    """What of `model.peft`, `model.adapter` and `model.quantization` cannot work, as far as files here tell.

    Raises:
        ModelError: as `resolved`.
    """
    model = resolved(recipe.model)
    if recipe.model.peft is not None:
        yield from _wrong_lora(recipe, recipe.model.peft, module_names(model), needs, locations)
    if recipe.model.quantization is not None:
        yield from _wrong_quantization(recipe, needs, locations)
    if model.adapter is not None and model.adapter.mode == "merge" and recipe.model.quantization is not None:
        yield NeedsError(
            "an adapter cannot be merged into a quantised base: its weights would be rounded to 4 or 8 bits",
            where=locations.place(("model", "adapter")),
            hint="train it on with mode: continue, or merge it first: posttrain export",
        )


def _wrong_lora(
    recipe: Recipe, lora: Lora, names: list[str] | None, needs: Needs, locations: Locations
) -> Iterator[NeedsError]:
    section: KeyPath = ("model", "peft")
    asked = {"target_modules": lora.target_modules, "modules_to_save": lora.modules_to_save}
    known = {"target_modules": names or (), "modules_to_save": with_blocks(names or ())}
    for key, targets in asked.items():
        if targets is None or isinstance(targets, str):
            continue
        for target in targets:
            head = target.rpartition(".")[2] in HEADS
            if key == "target_modules" and head:
                yield NeedsError(
                    f"an adapter on {target} would not be trained: log-probs are computed from the head's own weight",
                    where=locations.where((*section, key)),
                    hint=f"take it out of target_modules; modules_to_save: [{target}] trains it as a whole",
                )
            elif names is not None and not head and not any(matches([target], name) for name in known[key]):
                yield _no_module(target, names, locations.where((*section, key)))
    for key, patterns in {"rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern}.items():
        for pattern in patterns or ():
            if names is not None and not any(
                any(find(rf"\A(.*\.)?({pattern})$", name, where=locations.where((*section, key)))) for name in names
            ):
                yield _no_module(pattern, names, locations.where((*section, key)))
    if lora.layers_to_transform is not None and lora.target_modules == "all-linear":
        yield NeedsError(
            "a choice of layers needs names of modules, and target_modules is all-linear",
            where=locations.where((*section, "layers_to_transform")),
            hint="name them, e.g. target_modules: [q_proj, k_proj, v_proj, o_proj]",
        )
    odd = [rank for rank in (lora.r, *(lora.rank_pattern or {}).values()) if rank % 2]
    if lora.init_lora_weights == "orthogonal" and odd:
        yield NeedsError(
            f"orthogonal initialisation needs even ranks, not {odd[0]}",
            where=locations.where((*section, "init_lora_weights")),
        )
    layers = {int(n) for name in names or () for n in re.findall(r"\.(\d+)\.", f".{name}.")[:1]}
    for layer in lora.layers_to_transform or ():
        if names is not None and layer not in layers:
            yield NeedsError(
                f"there is no layer {layer}",
                where=locations.where((*section, "layers_to_transform")),
                hint=f"the model's are 0 to {max(layers, default=0)}",
            )
    held_out = recipe.evaluation is not None and recipe.evaluation.preferences is not None
    if lora.bias != "none" and (needs.reference or held_out):
        yield NeedsError(
            "biases are trained in place, so the policy without its adapter would not be the start any more, which is "
            "the reference",
            where=locations.where((*section, "bias")),
            hint="set bias: none",
        )
    separate = (
        needs.critic and needs.trains != "policy" and (recipe.critic is None or recipe.critic.trunk == "separate")
    )
    for key in ("dora", "modules_to_save", "bias"):
        value = getattr(lora, key)
        if separate and value and value != "none":
            yield NeedsError(
                f"the critic's adapter does not have {key}",
                where=locations.where((*section, key)),
                hint="leave it out, or set critic.trunk: shared",
            )


def with_blocks(names: Iterable[str]) -> list[str]:
    """Names of modules with weights, and of all that these are parts of."""
    found = [name.split(".") for name in names]
    return sorted({".".join(parts[:end]) for parts in found for end in range(1, len(parts) + 1)})


def _no_module(target: str, names: Iterable[str], where: str) -> NeedsError:
    leaves = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
    return NeedsError(f"no module of the model is called {target!r}", where=where, hint=nearest(target, leaves))


def _wrong_quantization(recipe: Recipe, needs: Needs, locations: Locations) -> Iterator[NeedsError | StackError]:
    section: KeyPath = ("model", "quantization")
    if find_spec("bitsandbytes") is None:
        yield StackError(
            "a quantised base needs the package bitsandbytes, which is not installed",
            where=locations.place(section),
            hint="pip install 'posttrain[quantized]', or leave quantization out",
        )
    if not recipe.model.adapted and needs.trains != "critic":
        yield NeedsError(
            "the weights of a quantised base cannot be trained",
            where=locations.place(section),
            hint="train an adapter on it: model.peft: {type: lora}; or leave quantization out",
        )
    if needs.critic and (recipe.critic is None or recipe.critic.trunk == "separate"):
        yield NeedsError(
            "a critic with a backbone of its own starts from whole weights, and these are quantised",
            where=locations.place(section),
            hint="set critic.trunk: shared, or leave quantization out",
        )
    if recipe.rollouts is not None and needs.rollouts and recipe.rollouts.sync_every > 1 and not recipe.model.adapted:
        yield NeedsError("a policy that lags needs trained weights", where=locations.where(("rollouts", "sync_every")))
