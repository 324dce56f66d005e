"""A data section with several sources: their names, and how often each is drawn from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.schema import FileSource, GymSource, Source, Traces, TraceSource


def parts(section: Source | Traces | Sequence[Source | Traces], name: str) -> list[tuple[str, Any]]:
    """The sources of a data section with their names: a single one bears the name of the section."""
    if not isinstance(section, list | tuple):
        return [(name, section)]
    named: dict[str, Any] = {}
    for source in section:
        wanted = source.source or _own_name(source)
        label, number = wanted, 1
        while label in named:
            number += 1
            label = f"{wanted}-{number}"
        named[label] = source
    return list(named.items())


def weights(section: Source | Traces | Sequence[Source | Traces], name: str) -> dict[str, float] | None:
    """Share of the draws of each source, summing to 1; None where the rows are simply put together."""
    found = {label: source.weight for label, source in parts(section, name)}
    if not isinstance(section, list | tuple) or None in found.values():
        return None
    total = sum(found.values())
    return {label: weight / total for label, weight in found.items()}


def source_of(problem_id: str) -> str:
    """The name of the source of a row, from the id of its problem: `name/row number`."""
    return problem_id.rpartition("/")[0]


def _own_name(source: Source | Traces) -> str:
    if isinstance(source, FileSource | TraceSource):
        path = source.path if isinstance(source.path, str) else source.path[0]
        stem = Path(path).name.split(".")[0]
        return re.sub(r"[^\w\-]+", "_", stem) or "data"
    return source.reasoning_gym if isinstance(source, GymSource) else source.task
