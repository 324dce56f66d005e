"""How many tokens a model can read, from its config.json alone, and limits of a recipe that go beyond."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.adapters import resolved
from posttrain.config.foreign_files import read_json, refuse_settings
from posttrain.config.locations import Locations
from posttrain.config.needs import Needs
from posttrain.config.schema import ModelConfig, Recipe
from posttrain.errors import NeedsError

KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
"""Names of the number of positions in config.json."""

STRETCHING = ("linear", "dynamic", "yarn")
"""Types of RoPE scaling whose factor comes on top of the positions; the others' positions are those after scaling."""

UNLIMITED = ("bloom", "falcon_mamba", "mamba", "mamba2", "mpt", "recurrent_gemma", "rwkv", "xlstm")
"""Types whose positions are no limit: ALiBi, or a state in place of positions."""


def config_json(model: ModelConfig) -> dict[str, Any] | None:
    """The model's config.json, from its folder or from the Hub's cache here; None where there is none.

    Downloads nothing.

    Raises:
        ModelError: it is no JSON, names code of the Hub, or has more layers than any model.
    """
    if model.path is None:
        return None
    model = resolved(model)
    assert model.path is not None  # an adapter names its base
    file = Path(model.path).expanduser() / "config.json"
    if not file.exists():
        if (
            Path(model.path).expanduser().exists()
            or model.path.count("/") > 1
            or model.path.startswith((".", "/", "~"))
        ):
            return None
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        except HFValidationError:  # no name of a repository; who loads the model says so
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    found = read_json(file)
    refuse_settings(found, file)
    return found


def model_positions(model: ModelConfig) -> int | None:
    """Most tokens of a sequence; None for models without a limit, and where config.json is not here."""
    if model.init is not None:
        return model.init.max_length
    config = config_json(model)
    return None if config is None else positions_of(config)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The same from the content of a config.json; a wrapper of a multimodal model counts as its text model."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    if config.get("model_type") in UNLIMITED or config.get("alibi") is True:
        return None
    limit = next((config[key] for key in KEYS if isinstance(config.get(key), int)), None)
    if limit is None:
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) not in STRETCHING:
        return limit
    trained = scaling.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * float(scaling.get("factor") or 1.0)))


def beyond_positions(recipe: Recipe, needs: Needs, locations: Locations) -> Iterator[NeedsError]:
    """Limits that let rows be longer than the model can read."""
    positions = model_positions(recipe.model)
    if positions is None:
        return
    data, rollouts = recipe.data, recipe.rollouts
    further = rollouts.max_new_tokens if needs.rollouts and rollouts is not None else 0
    says = f"the model reads at most {positions:,} tokens"
    if recipe.environment is not None and recipe.environment.episode_tokens > positions:
        yield NeedsError(
            f"environment.episode_tokens is {recipe.environment.episode_tokens:,}, and {says}",
            where=locations.where(("environment", "episode_tokens")),
            hint=f"set it to at most {positions}",
        )
    if data.max_length is not None and data.max_length > positions:
        yield NeedsError(
            f"data.max_length is {data.max_length:,}, and {says}",
            where=locations.where(("data", "max_length")),
            hint=f"set it to at most {positions}, or leave it out: that is its default",
        )
    if data.max_prompt_length is not None and data.max_prompt_length + further > positions:
        together = f" and rollouts.max_new_tokens {further:,}" if further else ""
        yield NeedsError(
            f"data.max_prompt_length is {data.max_prompt_length:,}{together}, and {says}",
            where=locations.where(("data", "max_prompt_length")),
            hint=f"set it to at most {positions - further}" if positions > further else "lower rollouts.max_new_tokens",
        )
    elif further >= positions:
        yield NeedsError(
            f"rollouts.max_new_tokens is {further:,}, and {says}, prompt included",
            where=locations.where(("rollouts", "max_new_tokens")),
            hint="lower it",
        )
