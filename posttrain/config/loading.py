"""Recipes and other configuration files: YAML and overrides to validated, immutable objects, and back to YAML."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from posttrain.config.effects import keys_left_unsaid
from posttrain.config.locations import Locations, Path, raise_all
from posttrain.config.overrides import apply_overrides
from posttrain.config.plugins import load_plugins
from posttrain.config.schema import Recipe
from posttrain.config.validation import Context, method_config, validate
from posttrain.config.yaml_file import read_file
from posttrain.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


def load_recipe(
    path: str | FilePath, overrides: Sequence[str], methods: Mapping[str, type[BaseModel]], *, run_plugins: bool = True
) -> Recipe:
    """A recipe from a YAML file and `section.key=value` overrides.

    Args:
        path: the recipe.
        overrides: dotted keys; values are YAML; later ones win.
        methods: method name to the class of its section; looked at after the plugins that the recipe names are loaded.
        run_plugins: load them. Without it what they would define is unknown, and refused with a word about that.

    Raises:
        RecipeError: the file cannot be read, or a key is unknown, missing or has a wrong value. Several of them are
            raised together as RecipeErrors.
    """
    return load_recipe_with_locations(path, overrides, methods, run_plugins=run_plugins)[0]


def load_recipe_with_locations(
    path: str | FilePath, overrides: Sequence[str], methods: Mapping[str, type[BaseModel]], *, run_plugins: bool = True
) -> tuple[Recipe, Locations]:
    """As `load_recipe`, together with the line or override that each key comes from."""
    data, locations = read_file(path)
    apply_overrides(data, locations, overrides)
    if "stages" in data and "model" not in data:
        raise RecipeError("this is a pipeline, not a recipe", where=str(path), hint=f"posttrain run {path}")
    return build_recipe(data, locations, methods, run_plugins=run_plugins), locations


def build_recipe(
    data: dict[str, Any], locations: Locations, methods: Mapping[str, type[BaseModel]], *, run_plugins: bool = True
) -> Recipe:
    """A recipe from plain data, e.g. one written inside another file.

    Raises:
        RecipeError: as for `load_recipe`.
    """
    written = data.get("plugins")
    if run_plugins and isinstance(written, list) and all(isinstance(name, str) for name in written):  # see validation
        folder = FilePath(locations.file).parent
        data = data | {"plugins": load_plugins(written, where=locations.where(("plugins",)), folder=folder)}
    else:
        load_plugins((), where=locations.file)
    context = Context(locations, Recipe, methods)
    recipe, errors = validate(Recipe, data, context)
    method = None
    if "method" in data:
        method, method_errors = method_config(data["method"], methods, context)
        errors = errors + method_errors
    if errors and written and not run_plugins:
        what = "the plugins of this recipe, which may define what is unknown here, are code and were not loaded"
        hint = "if you trust them: `check` and `study --check` take --run-code; others posttrain --plugin FILE before"
        errors = [*errors, RecipeError(what, where=locations.where(("plugins",)), hint=hint)]
    raise_all(errors)
    assert recipe is not None  # without errors there is one
    return recipe.model_copy(update={"method": method})


def load_config(path: str | FilePath, schema: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Any other YAML file, validated by `schema`, with errors of the same kind as a recipe's.

    Raises:
        RecipeError: as for `load_recipe`.
    """
    data, locations = read_file(path)
    return parse_config(data, schema, overrides, locations)


def parse_config(
    data: dict[str, Any], schema: type[Model], overrides: Sequence[str] = (), locations: Locations | None = None
) -> Model:
    """As `load_config`, for data that is not from a file, or was read before. `data` is changed by the overrides.

    Raises:
        RecipeError: as for `load_recipe`.
    """
    locations = locations or Locations("command line")
    apply_overrides(data, locations, overrides)
    config, errors = validate(schema, data, Context(locations, schema))
    raise_all(errors)
    assert config is not None  # without errors there is one
    return config


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with its defaults filled in; it loads to an equal recipe."""
    return as_yaml(recipe_values(recipe))


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with its defaults filled in.

    Left out are defaults of keys that nothing reads in this recipe: written down they would be refused as keys
    without effect.
    """
    data = recipe.model_dump(exclude={"method"})
    for path in keys_left_unsaid(recipe):
        _remove_default(recipe, data, path)
    data["method"] = _accepted_values(recipe.method)
    return {name: _plain(data[name]) for name in Recipe.model_fields if name in data}


def as_yaml(values: dict[str, Any]) -> str:
    """Plain data as YAML, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel's default is None
    yaml.width, yaml.allow_unicode = 120, True
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def _remove_default(recipe: Recipe, data: dict[str, Any], path: Path) -> None:
    section: Any = recipe
    step: Any
    for step in path[:-1]:
        section, data = (section[step] if isinstance(step, int) else getattr(section, step)), data[step]
    if path[-1] not in section.model_fields_set:
        data.pop(str(path[-1]), None)


def _accepted_values(config: BaseModel) -> dict[str, Any]:
    """Values of a method section, without defaults that it would refuse if they were written.

    Method sections refuse keys without effect by looking at what was written, and only they know which these are.
    """
    schema, values = type(config), config.model_dump()
    accepted = {name: values[name] for name in schema.model_fields if name in config.model_fields_set}
    accepted = {"name": values["name"]} | accepted
    for name in schema.model_fields:
        candidate = accepted | {name: values[name]}
        try:
            schema.model_validate(candidate)
        except ValidationError:
            continue
        accepted = candidate
    return {name: accepted[name] for name in schema.model_fields if name in accepted}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
