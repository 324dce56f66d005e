"""YAML 1.2 text to plain data with the line of every key. Duplicate keys, unknown tags and endless aliases are errors.

The node tree is walked here instead of asking the YAML package for data, because only nodes know the line of every key
and because its loaders turn some plain words (dates) into objects that no recipe wants.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import count
from pathlib import Path as FilePath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from posttrain.bounded_files import read_bytes
from posttrain.config.locations import Locations, Path, dotted, raise_all
from posttrain.errors import RecipeError, nearest

_TAG = "tag:yaml.org,2002:"
MOST_VALUES = 100_000
"""Values of a file with its anchors written out. A few lines of anchors within anchors would be billions."""

MOST_DEPTH = 64
"""Mappings and lists within one another."""

LONGEST_NUMBER = 100
"""Characters of one. Python prints no whole number of more than some thousand digits, in an error neither."""

_WORDS = {_TAG + "str", _TAG + "timestamp", _TAG + "value"}
_SCALARS = {_TAG + "null", _TAG + "bool", _TAG + "int", _TAG + "float"}


def read_file(path: str | FilePath) -> tuple[dict[str, Any], Locations]:
    """The mapping in a YAML file and the line of each of its keys.

    Raises:
        RecipeError: the file is missing, empty, not text, not YAML, or not a mapping; or has duplicate keys.
    """
    path = FilePath(path)
    text = _text(path)
    data, locations = read_text(text, str(path))
    if data is None:
        raise RecipeError("the file is empty", where=str(path), hint="a configuration is a mapping: `key: value` lines")
    if not isinstance(data, dict):
        kind = "list" if isinstance(data, list) else "single value"
        raise RecipeError(
            f"expected a mapping, got a {kind}", where=f"{path}:1", hint="write `key: value` lines at the top level"
        )
    return data, locations


def read_text(text: str, name: str) -> tuple[Any, Locations]:
    """Plain data of one YAML document (None if it is empty) and the places of its keys as `name:line`.

    Raises:
        RecipeError: not YAML, or duplicate keys; all duplicates together as RecipeErrors.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Bounded
    try:
        node = yaml.compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}, column {mark.column + 1}" if mark else name
        raise RecipeError(f"not valid YAML: {error.problem}", where=where, hint=_syntax_hint(error)) from error
    except YAMLError as error:
        raise RecipeError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from error
    except RecursionError as error:
        raise RecipeError("nested too deeply", where=name) from error
    reader = _Reader(name, yaml.constructor, count(1))
    data = None if node is None else reader.value(node, (), ())
    raise_all(reader.errors)
    return data, reader.locations


def _text(path: FilePath) -> str:
    try:
        return read_bytes(path, RecipeError).decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError as error:
        folder = path.parent
        if not folder.is_dir():
            raise RecipeError(f"no such folder: {folder}", where=str(path)) from error
        names = [entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml")]
        raise RecipeError("no such file", where=str(path), hint=nearest(path.name, names)) from error
    except IsADirectoryError as error:
        raise RecipeError("is a folder, not a file", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError("is not UTF-8 text", where=str(path)) from error


def _syntax_hint(error: MarkedYAMLError) -> str:
    if "\\t" in str(error.problem):
        return "indent with spaces: YAML allows no tabs"
    if "mapping values are not allowed" in str(error.problem):
        return "put text that contains ': ' in quotes"
    return ""


class _Bounded(Composer):
    """Composes no more nodes than a file may have: a node takes a thousand times its text."""

    made = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.made += 1
        if self.made > 2 * MOST_VALUES:  # keys are nodes too
            raise YAMLError(f"more than {MOST_VALUES:,} values")
        return super().compose_node(parent, index)


class _Reader:
    """Nodes to data; collects errors instead of stopping at the first."""

    def __init__(self, name: str, constructor: SafeConstructor, seen: Iterator[int]) -> None:
        self.name, self.constructor, self.seen = name, constructor, seen
        self.locations = Locations(name)
        self.errors: list[RecipeError] = []

    def value(self, node: Node, path: Path, above: tuple[Node, ...]) -> Any:
        if next(self.seen) > MOST_VALUES:
            what = f"more than {MOST_VALUES:,} values, with its anchors written out"
            raise RecipeError(what, where=f"{self.name}:{node.start_mark.line + 1}")
        if len(above) > MOST_DEPTH:
            raise RecipeError("nested too deeply", where=f"{self.name}:{node.start_mark.line + 1}")
        if any(node is ancestor for ancestor in above):
            self._error(f"{node.anchor!r} contains itself", node, path)
            return None
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, (*above, node))
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return self._sequence(node, path, (*above, node))
        if isinstance(node, ScalarNode) and "\0" in node.value:  # which no path or name may have
            self._error("a text with a NUL character", node, path)
            return None
        if isinstance(node, ScalarNode) and node.tag in _WORDS:
            return node.value
        if isinstance(node, ScalarNode) and node.tag in _SCALARS:
            try:
                if len(node.value) > LONGEST_NUMBER:
                    raise ValueError
                return self.constructor.construct_object(node)
            except (YAMLError, ValueError):
                self._error(f"{node.value[:LONGEST_NUMBER]!r} is no {node.tag.removeprefix(_TAG)}", node, path)
                return None
        self._error(f"the tag {str(node.tag).removeprefix(_TAG)!r} is not supported", node, path)
        return None

    def _mapping(self, node: MappingNode, path: Path, above: tuple[Node, ...]) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        merged: list[tuple[Node, Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged.append((key_node, value_node))
                continue
            key = self.value(key_node, path, above)
            if isinstance(key, bool) or not isinstance(key, str | int):
                self._error("a key must be text or a whole number", key_node, path)
                continue
            line = key_node.start_mark.line + 1
            if key in result:
                self._error(f"the key is given twice, here and in line {lines[key]}", key_node, (*path, key))
                continue
            lines[key] = line
            self.locations.places[(*path, key)] = f"{self.name}:{line}"
            result[key] = self.value(value_node, (*path, key), above)
        for key_node, value_node in merged:
            self._merge(result, key_node, value_node, path, above)
        return result

    def _merge(self, result: dict[Any, Any], key_node: Node, value_node: Node, path: Path, above: tuple) -> None:
        """`<<: *anchor`: keys that are not written here come from the anchored mapping."""
        sources = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
        for source in sources:
            if not isinstance(source, MappingNode):
                self._error("`<<` takes a mapping or a list of mappings", key_node, path)
                continue
            inner = _Reader(self.name, self.constructor, self.seen)
            values = inner.value(source, path, above)
            self.errors += inner.errors
            for key in [key for key in values or {} if key not in result]:
                result[key] = values[key]
                here = (*path, key)
                self.locations.places |= {
                    known: place for known, place in inner.locations.places.items() if known[: len(here)] == here
                }

    def _sequence(self, node: SequenceNode, path: Path, above: tuple[Node, ...]) -> list[Any]:
        for index, item in enumerate(node.value):
            self.locations.places[(*path, index)] = f"{self.name}:{item.start_mark.line + 1}"
        return [self.value(item, (*path, index), above) for index, item in enumerate(node.value)]

    def _error(self, what: str, node: Node, path: Path) -> None:
        place = f"{self.name}:{node.start_mark.line + 1}"
        self.errors.append(RecipeError(what, where=f"{place}: {dotted(path)}" if path else place))
