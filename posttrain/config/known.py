"""What a schema allows: which keys stand where, and each type in words. For error messages only."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from posttrain.config import foreign
from posttrain.config.locations import Path, dotted
from posttrain.config.registered import sections_of
from posttrain.errors import nearest


def bare(annotation: Any) -> Any:
    """The annotation without `Annotated[...]` and, where one type remains, without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [member for member in get_args(annotation) if member is not types.NoneType]
        if len(rest) == 1:
            return bare(rest[0])
    return annotation


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, None left out; a list of one for anything else. `Annotated` marks are kept."""
    inner = bare(annotation)
    if get_origin(inner) in (Union, types.UnionType):
        return [member for member in get_args(inner) if member is not types.NoneType]
    return list(sections_of(inner)) or [inner]


def _flat_members(annotation: Any) -> list[Any]:
    """The alternatives of a union, and of unions within it."""
    found = members(annotation)
    return [annotation] if len(found) == 1 else [inner for member in found for inner in _flat_members(member)]


def is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def child(annotation: Any, step: str | int) -> Any:
    """Annotation of a key or entry of `annotation`, which is no union; None when it has no such child."""
    if is_model(annotation):
        found = annotation.model_fields.get(step)
        return found and found.annotation
    args = get_args(annotation)
    if get_origin(annotation) is tuple and isinstance(step, int) and Ellipsis not in args:
        return args[step] if step < len(args) else None
    if get_origin(annotation) in (list, tuple, set, frozenset):
        return args[0]
    return args[1] if get_origin(annotation) is dict else None


def member_named(annotation: Any, label: str) -> Any:
    """The alternative of a union that pydantic calls `label` in its error paths."""
    for member in members(annotation):
        tags = [mark.tag for mark in getattr(member, "__metadata__", ()) if isinstance(mark, Tag)]
        inner = bare(member)
        if label in tags or (is_model(inner) and (label in single_literals(inner) or inner.__name__ in label)):
            return inner
        if label.split("[")[0] == getattr(get_origin(inner) or inner, "__name__", "").lower():
            return inner
    return None


def single_literals(model: type[BaseModel]) -> list[Any]:
    """Values of fields that allow one value only: what tells the members of a discriminated union apart."""
    choices = [get_args(f.annotation) for f in model.model_fields.values() if get_origin(f.annotation) is Literal]
    return [values[0] for values in choices if len(values) == 1]


# ---------------------------------------------------------------------------------------------------- where keys stand


def walk(annotation: Any, path: Path = ()) -> Iterator[tuple[Path, type[BaseModel]]]:
    """All sections under `annotation`; entries of lists count as their list."""
    for member in members(annotation):
        inner = bare(member)
        if is_model(inner):
            yield path, inner
            for name, info in inner.model_fields.items():
                yield from walk(info.annotation, (*path, name))
        elif get_origin(inner) in (list, tuple):
            yield from walk(get_args(inner)[0], path)


def kind(model: type[BaseModel]) -> str:
    """How a user tells this alternative from its siblings: `type: math`, or the key that it must have."""
    for name, info in model.model_fields.items():
        if get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1:
            return f"`{name}: {get_args(info.annotation)[0]}`"
    required = [name for name, info in model.model_fields.items() if info.is_required()]
    return f"`{required[0]}`" if required else model.__name__


def unknown_key_hint(
    key: str, path: Path, owner: type[BaseModel], root: type[BaseModel], methods: Mapping[str, type[BaseModel]]
) -> str:
    """What a user may have meant by an unknown `key` of the section `owner` at `path`."""
    section = tuple(part for part in path if not isinstance(part, int))
    sections = [(place, model) for place, model in walk(root) if key in model.model_fields]
    siblings = [model for place, model in sections if place == section and model is not owner]
    takers = [name for name, config in methods.items() if key in config.model_fields]
    elsewhere = sorted(
        {f"`{dotted(place)}`" if place else "no section (the top level)" for place, _ in sections if place != section}
    )
    if takers and section != ("method",):
        elsewhere.append("`method`")
    hints = []
    if f"`{key}`" in map(kind, siblings):
        hints.append(f"`{key}` and {kind(owner)} exclude each other: give one of them")
    elif siblings:
        others = " or ".join(dict.fromkeys(kind(model) for model in siblings))
        hints.append(f"{key!r} goes with {others}, and this section has {kind(owner)}")
    if section == ("method",) and takers:
        hints.append(f"{key!r} is a parameter of {', '.join(takers)}")
    if 0 < len(elsewhere) <= 2:
        hints.append(f"{key!r} belongs under {' or '.join(elsewhere)}")
    if not hints and (theirs := foreign.hint(key)):
        return theirs
    close = nearest(key, owner.model_fields)
    if not hints or close.startswith("did you mean"):
        hints.append(close)
    return "; ".join(hint for hint in hints if hint)


# ------------------------------------------------------------------------------------------------------ types in words

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
_ENTRIES = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts", dict: "mappings"}


def limits(info: FieldInfo | None) -> str:
    """The range of a field in words: `at least 1 and below 2`; empty without one."""
    words = {annotated_types.Ge: "at least", annotated_types.Gt: "greater than"}
    words |= {annotated_types.Le: "at most", annotated_types.Lt: "below"}
    parts = []
    for mark in info.metadata if info else ():
        if type(mark) in words:
            bound = next(iter(vars(mark).values())) if hasattr(mark, "__dict__") else getattr(mark, mark.__slots__[0])
            parts.append(f"{words[type(mark)]} {bound:,.12g}")
    return " and ".join(parts)


def in_words(annotation: Any) -> str:
    """`int | None` as `a whole number`, `list[str]` as `a list of texts`."""
    described = []
    for member in _flat_members(annotation):
        inner = bare(member)
        origin = get_origin(inner)
        if origin is Literal:
            values = [value if isinstance(value, str) else repr(value) for value in get_args(inner)]
            described.append(values[0] if len(values) == 1 else "one of " + ", ".join(values))
        elif origin in (list, tuple):
            described.append(f"a list of {_entries(inner)}")
        elif is_model(inner):
            described.append("a mapping")
        else:
            described.append(_WORDS.get(origin or inner, getattr(inner, "__name__", str(inner))))
    return " or ".join(dict.fromkeys(described))


def _entries(annotation: Any) -> str:
    entries = [arg for arg in get_args(annotation) if arg is not Ellipsis]
    args = [bare(member) for arg in entries for member in _flat_members(arg)]
    kinds = " or ".join(
        dict.fromkeys(_ENTRIES.get(arg, "mappings" if is_model(arg) else in_words(arg)) for arg in args)
    )
    fixed = get_origin(annotation) is tuple and Ellipsis not in get_args(annotation)
    return f"{len(entries)} {kinds}" if fixed else kinds


def value_in_words(value: Any) -> str:
    """A value as an error message shows it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"text {value if len(value) <= 60 else value[:57] + '...'!r}"
    if isinstance(value, int | float):
        return f"{value!r}"
    return "a list" if isinstance(value, list) else "a mapping"
