"""Strict validation of plain data by a schema, with errors that name file, line, key and the nearest valid choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from posttrain.config import known
from posttrain.config.locations import Locations, Path
from posttrain.errors import RecipeError, nearest

Model = TypeVar("Model", bound=BaseModel)


@dataclass(slots=True)
class Context:
    """What messages need to know besides the error itself.

    Attributes:
        locations: places of the keys.
        root: schema of the whole file.
        methods: method name to the schema of its section; empty for files without one.
        base: path of the validated part within the file.
    """

    locations: Locations
    root: type[BaseModel]
    methods: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    base: Path = ()


def validate(schema: type[Model], data: Any, context: Context) -> tuple[Model | None, list[RecipeError]]:
    """The validated model, or None and every error in it.

    No type is converted, except a whole number to a number. Lists may stand for tuples.
    """
    try:
        # JSON mode: strict on scalars, yet a list is a tuple and a mapping may have whole numbers as keys.
        folder = FilePath(context.locations.file).parent  # from which a recipe names files of the user's code
        return schema.model_validate_json(json.dumps(data), strict=True, context={"folder": folder}), []
    except ValidationError as error:
        found = [_locate(raw, schema, data) for raw in error.errors(include_url=False)]
    errors: list[RecipeError] = []
    for issue in _of_closest_alternatives(found):
        message = _message(issue, context)
        if str(message) not in (str(other) for other in errors):
            errors.append(message)
    return None, errors


@dataclass(slots=True)
class _Issue:
    """A pydantic error in terms of the file.

    Attributes:
        raw: pydantic's error.
        path: keys and positions from the validated root, without the names of union members.
        unions: paths of the unions on the way.
        owner: annotation of the section that holds the last key.
        info: the field, where the last step is one.
        annotation: type of the value at `path`.
        value: what was written there.
    """

    raw: Mapping[str, Any]
    path: Path
    unions: list[Path]
    owner: Any
    info: FieldInfo | None
    annotation: Any
    value: Any


def _locate(raw: Mapping[str, Any], schema: type[BaseModel], data: Any) -> _Issue:
    """Walk pydantic's path along the schema, which tells real keys from names of union members."""
    annotation: Any = schema
    field_annotation: Any = schema
    owner, info = None, None
    path: Path = ()
    unions: list[Path] = []
    for step in raw["loc"]:
        annotation = known.bare(annotation)
        if step == "[key]":
            field_annotation = get_args(owner)[0]
            continue
        if len(known.members(annotation)) > 1:
            unions.append(path)
            member = known.member_named(annotation, str(step))
            if member is not None:
                annotation = member
                continue
            # A path written by a validator of ours has no names of union members.
            options = [known.bare(option) for option in known.members(annotation)]
            annotation = next((option for option in options if known.child(option, step) is not None), None)
        owner, path = annotation, (*path, step)
        info = annotation.model_fields.get(step) if known.is_model(annotation) else None
        annotation = field_annotation = known.child(annotation, step)
    return _Issue(raw, path, unions, owner, info, field_annotation, raw["input"])


def _of_closest_alternatives(issues: list[_Issue]) -> list[_Issue]:
    """Of a union that is tried member by member, keep the errors of the member that came furthest."""
    deeper = {union for issue in issues for union in issue.unions if len(issue.path) > len(union)}
    kept = [issue for issue in issues if not (issue.path in issue.unions and issue.path in deeper)]
    return kept


def _message(issue: _Issue, context: Context) -> RecipeError:
    path, kind = (*context.base, *issue.path), issue.raw["type"]
    where = context.locations.where(path)
    if kind == "extra_forbidden":
        hint = known.unknown_key_hint(str(path[-1]), path[:-1], issue.owner, context.root, context.methods)
        return RecipeError("unknown key", where=where, hint=hint)
    if kind == "missing":
        return _missing(issue, path, context)
    if kind == "value_error":
        # Raised by a validator as ValueError, or as pydantic's own error type with a finished message.
        return RecipeError(str(issue.raw["ctx"].get("error", issue.raw["msg"])), where=where)
    if kind == "union_tag_not_found":
        key = issue.raw["ctx"]["discriminator"].strip("'")
        return RecipeError(f"missing key {key!r}", where=where, hint=f"one of {', '.join(_tags(issue))}")
    if kind == "union_tag_invalid":
        key, tag = issue.raw["ctx"]["discriminator"].strip("'"), issue.raw["ctx"]["tag"]
        return RecipeError(
            f"unknown {key} {tag!r}", where=context.locations.where((*path, key)), hint=nearest(tag, _tags(issue))
        )
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal") and known.limits(issue.info):
        return RecipeError(f"must be {known.limits(issue.info)}, got {issue.value!r}", where=where)
    if kind == "too_short":
        return RecipeError(f"needs at least {issue.raw['ctx']['min_length']} entry", where=where)
    if kind == "finite_number":
        return RecipeError(f"must be a finite number, got {issue.value!r}", where=where)
    if kind.endswith(("_type", "_parsing")) or kind in ("literal_error", "int_from_float"):
        return _wrong_type(issue, where)
    return RecipeError(f"{issue.raw['msg']}, got {known.value_in_words(issue.value)}", where=where)


def _missing(issue: _Issue, path: Path, context: Context) -> RecipeError:
    key, section = path[-1], path[:-1]
    if isinstance(key, int):
        return RecipeError(f"expected {known.in_words(issue.owner)}", where=context.locations.where(section))
    hint = issue.info.description or "" if issue.info else ""
    model = issue.owner
    siblings = [other for place, other in known.walk(context.root) if place == _names(section) and other is not model]
    if siblings and known.kind(model) == f"`{key}`":
        hint = f"a section here has one of {', '.join(dict.fromkeys(known.kind(m) for m in (model, *siblings)))}"
    where = context.locations.where(section)
    return RecipeError(f"missing key {str(key)!r}", where=where, hint=hint)


def _names(path: Path) -> Path:
    return tuple(part for part in path if not isinstance(part, int))


def _tags(issue: _Issue) -> list[str]:
    """Tags of a discriminated union."""
    return [str(tag) for member in known.members(issue.annotation) for tag in known.single_literals(known.bare(member))]


def _wrong_type(issue: _Issue, where: str) -> RecipeError:
    value, annotation = issue.value, issue.annotation
    if annotation is None:
        return RecipeError(f"{issue.raw['msg']}, got {known.value_in_words(value)}", where=where)
    if "[key]" in issue.raw["loc"]:
        expected = known.in_words(annotation)
        return RecipeError(f"the key must be {expected}, got {known.value_in_words(issue.path[-1])}", where=where)
    limit = known.limits(issue.info)
    expected = known.in_words(annotation) + (f" ({limit})" if limit else "")
    return RecipeError(
        f"expected {expected}, got {known.value_in_words(value)}", where=where, hint=_repair(value, annotation)
    )


def _repair(value: Any, annotation: Any) -> str:
    """What to write instead, where that can be guessed."""
    kinds = {get_origin(known.bare(m)) or known.bare(m) for m in known.members(annotation)}
    choices = [c for m in known.members(annotation) for c in get_args(known.bare(m)) if isinstance(c, str)]
    if isinstance(value, str):
        if choices and value:
            close = nearest(value, choices)
            return close if close.startswith("did you mean") else ""
        if bool in kinds and value.lower() in ("yes", "no", "on", "off", "true", "false"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}, without quotes"
        if kinds & {int, float} and _is_number(value):
            return f"write {value} without quotes"
        if list in kinds and not _holds_sections(annotation):
            return f"write [{value}]"
    if str in kinds and isinstance(value, int | float):
        return "put it in quotes"
    if str in kinds and isinstance(value, dict):
        return "put text that contains ': ' or braces in quotes"
    if int in kinds and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return ""


def _holds_sections(annotation: Any) -> bool:
    """Whether an annotation has sections within it, so that no text will do as an entry of its lists."""
    return next(known.walk(annotation), None) is not None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def method_config(
    data: Any, methods: Mapping[str, type[BaseModel]], context: Context
) -> tuple[BaseModel | None, list[RecipeError]]:
    """The `method` section, validated by the class of the method that it names."""
    where = context.locations.where(("method",))
    if not isinstance(data, dict):
        return None, [
            RecipeError(f"expected a mapping, got {known.value_in_words(data)}", where=where, hint="name: ...")
        ]
    if "name" not in data:
        return None, [RecipeError("missing key 'name'", where=where, hint=f"one of {', '.join(sorted(methods))}")]
    name = data["name"]
    if not isinstance(name, str) or name not in methods:
        where = context.locations.where(("method", "name"))
        return None, [RecipeError(f"unknown method {name!r}", where=where, hint=nearest(str(name), methods))]
    context = Context(context.locations, context.root, methods, base=("method",))
    return validate(methods[name], data, context)
