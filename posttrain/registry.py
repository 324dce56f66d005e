"""The tables of what a recipe may name: what is built in, and what plugins register."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar, get_args

from posttrain.errors import PluginError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name to entry. What is built in is imported when it is asked for, so that a recipe pays for what it names alone.

    Args:
        kind: what the entries are, for messages.
        built_in: name to the entry, or to `package.module:name` where it stands.
    """

    def __init__(self, kind: str, built_in: Mapping[str, T | str]) -> None:
        self.kind = kind
        self.entries: dict[str, T | str] = dict(built_in)

    def __getitem__(self, name: str) -> T:
        entry = self.entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self.entries[name] = getattr(import_module(module), attribute)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, name: str, entry: T) -> None:
        """Make an entry of a plugin known.

        Raises:
            PluginError: the name is taken.
        """
        if name in self.entries:
            raise PluginError(f"there is a {self.kind} {name!r} already", hint="give yours another name")
        self.entries[name] = entry

    def add_class(self, entry: Any, key: str) -> None:
        """The same for a class, by the name that its `Config` gives.

        Args:
            key: field of that section whose only value is the name.

        Raises:
            PluginError: it has no `Config` with a name, or the name is taken.
        """
        config = getattr(entry, "Config", None)
        fields: dict[str, Any] = getattr(config, "model_fields", {})
        field = fields.get(key)
        names = () if field is None else get_args(field.annotation)
        if len(names) != 1:
            raise PluginError(
                f"{self.kind} {entry.__name__} has no {key}",
                hint=f'give its Config a field `{key}: Literal["mine"] = "mine"`',
            )
        self.add(names[0], entry)
