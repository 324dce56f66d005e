"""What a recipe with pictures asks for that is not built, and pictures that nothing would look at.

Whatever stands here is refused and never half done. Imports without torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

from posttrain.config.adapters import resolved, trained_lora
from posttrain.config.effects import sources, trace_sources
from posttrain.config.locations import Locations, Path
from posttrain.config.needs import Needs
from posttrain.config.positions import config_json
from posttrain.config.schema import FileSource, Recipe, Source, TaskSource
from posttrain.config.shapes import model_shape
from posttrain.config.tasks import TASKS
from posttrain.errors import NeedsError

SECTIONS = ("prompts", "completions", "preferences", "traces")
"""Sections of `data` whose rows may hold pictures."""


def shows_pictures(source: Source) -> str | None:
    """The key by which the rows of a source have pictures: files name them, tasks draw them; None if they have none."""
    if isinstance(source, TaskSource):
        return "task" if getattr(TASKS.get(source.task), "pictures", False) else None
    return "images" if isinstance(source, FileSource) and source.images is not None else None


def _pictured(recipe: Recipe) -> list[Path]:
    """Places of the keys by which sources have pictures."""
    keys = ((path, shows_pictures(source)) for path, source in sources(recipe))
    return [(*path, key) for path, key in keys if key is not None]


def refuse_pictures(recipe: Recipe, needs: Needs, locations: Locations) -> Iterator[NeedsError]:
    """What a recipe with pictures asks for that is not built, and pictures that nothing would look at."""
    given, named = recipe.model.pictures, _pictured(recipe)
    if given is None:
        for path in named:
            yield NeedsError(
                "the rows hold pictures, and the model is loaded as one of text",
                where=locations.where(path),
                hint="add `model.pictures: {}`, with a model that reads them (docs/pictures.md), or take rows without",
            )
        return
    unseen = recipe.environment is not None or any(trace_sources(recipe))
    if not named and not unseen:
        yield NeedsError(
            "the key has no effect: no source says where its pictures are",
            where=locations.where(("model", "pictures")),
            hint="name the column, as in `data.completions.images: images`, or remove it to train the text part alone",
        )
    if recipe.model.init is None and "init" in given.model_fields_set:
        yield NeedsError(
            "the key has no effect: it is about the model that `model.init` makes",
            where=locations.where(("model", "pictures", "init")),
            hint="remove it",
        )
    for path in named:
        if path[0] == "data" and path[1] not in SECTIONS:
            yield NeedsError(
                f"rows of data.{path[1]} cannot hold pictures yet",
                where=locations.where(path),
                hint=f"sections whose rows can: {', '.join(SECTIONS)}",
            )
    yield from _parts_without_adapter(recipe, locations)
    for path, what, instead in _not_built(recipe, needs):
        yield NeedsError(f"{what} is not built for pictures", where=locations.where(path), hint=instead)


def _parts_without_adapter(recipe: Recipe, locations: Locations) -> Iterator[NeedsError]:
    """Parts of a model of text and pictures that the recipe trains and the adapter does not reach, as far as its shape
    is known."""
    model, lora = recipe.model, trained_lora(recipe.model)
    if model.pictures is None or lora is None or lora.modules_to_save:
        return
    shape = model_shape(resolved(model))
    if shape is None or shape.sight is None:
        return
    for part in model.pictures.train:
        linears = set(shape.linears) if part == "language" else shape.sight.names(part)
        reached = linears if isinstance(lora.target_modules, str) else linears & _last(lora.target_modules)
        if not reached:
            hint = f"its linear modules: {', '.join(sorted(linears))}" if linears else "it has no linear modules"
            yield NeedsError(
                f"the adapter has nothing in the {part}, which is to be trained",
                where=locations.where(("model", "pictures", "train")),
                hint=f"{hint}; or leave {part} out, or train it whole by modules_to_save",
            )


def _last(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


WITH_TORCHVISION = frozenset({"gemma3", "llava_onevision", "qwen2_5_vl", "qwen3_vl"})
"""Types for which vLLM imports torchvision: their processors of pictures on it, or of videos."""


def _type(recipe: Recipe) -> str:
    return "" if recipe.model.init is not None else str((config_json(recipe.model) or {}).get("model_type"))


def _wants_torchvision(recipe: Recipe) -> bool:
    return _type(recipe) in WITH_TORCHVISION and importlib.util.find_spec("torchvision") is None


def _not_built(recipe: Recipe, needs: Needs) -> Iterator[tuple[Path, str, str]]:
    """Place, what stands there, and the nearest valid choice."""
    model, data, rollouts = recipe.model, recipe.data, recipe.rollouts
    for each in [each for each in needs.companions if each.title and not each.own_tokens][:1]:
        what = f"a further model beside the policy ({each.title})"
        yield ("method", "name"), what, "take a method without one, as grpo"
    if needs.generates and rollouts is not None and rollouts.engine == "vllm" and rollouts.mode == "server":
        yield ("rollouts", "mode"), "sampling by a server of vLLM", "take mode: colocate, or engine: transformers"
    if needs.generates and rollouts is not None and rollouts.engine == "vllm" and _wants_torchvision(recipe):
        what = f"sampling by vLLM without torchvision, which it looks at pictures of {_type(recipe)} with,"
        yield ("rollouts", "engine"), what, "install the torchvision of your torch, or take engine: transformers"
    if data.streaming:
        yield ("data", "streaming"), "reading rows as they are needed", "set it to false"
    if data.too_long == "cut":
        yield ("data", "too_long"), "cutting rows, and a picture in them,", "take drop or error"
    if model.quantization is not None:
        yield ("model", "quantization"), "a base model in few bits", "leave it out; model.dtype: bfloat16 takes half"
    if model.adapter is not None:
        yield ("model", "adapter"), "starting from an adapter", "merge it first: posttrain export --merge"
    if model.attn_implementation not in (None, "sdpa", "eager"):
        yield ("model", "attn_implementation"), f"attention by {model.attn_implementation}", "take sdpa or eager"
    if recipe.reference is not None and recipe.reference.path is not None and needs.reference:
        yield (
            ("reference", "path"),
            "a reference of another model",
            "leave it out: the start of the run is the reference",
        )
    judging: list[Any] = [*(recipe.verifier or ())] if needs.verifier else []
    for number, each in enumerate(judging):
        if each.type in ("judge", "llm_judge", "principled", "levels", "process_reward"):
            yield (
                ("verifier", number),
                f"a verifier that reads the prompt ({each.type})",
                "take one of the answer alone",
            )
