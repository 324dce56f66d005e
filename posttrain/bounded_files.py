"""Files that somebody else may have written, read within bounds: what looks like settings may be 30 GiB of holes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import DataError, PosttrainError

MAX_SETTINGS = 16 * 2**20
"""Bytes of a file of settings or records: recipes, manifests, states."""

MAX_REPORT = 256 * 2**20
"""Bytes of a report of an evaluation, with the texts that were judged."""

MAX_DEPTH = 100
"""Lists and objects within one another; who reads them goes into them by recursion."""

MAX_LINE = 16 * 2**20
"""Bytes of one line of a log of JSON."""


def read_bytes(path: Path, error: type[PosttrainError] = DataError, most: int = MAX_SETTINGS) -> bytes:
    """What stands in a file.

    Raises:
        error: it is larger than that, or no plain file.
        OSError: there is none, or it cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise error("this is no plain file", where=str(path))
    with path.open("rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise error(f"larger than {most // 2**20} MiB, as no such file is", where=str(path))
    return found


def read_json(path: Path, error: type[PosttrainError] = DataError, most: int = MAX_SETTINGS) -> Any:
    """The JSON value in a file.

    Raises:
        error: it is larger than that, or not JSON, or has a whole number of more than 64 bits.
        OSError: there is none, or it cannot be read.
    """
    return parse_json(read_bytes(path, error, most), str(path), error)


def parse_json(text: str | bytes, where: str, error: type[PosttrainError] = DataError) -> Any:
    """A JSON value.

    Raises:
        error: it is none, has a whole number of more than 64 bits, or is nested more than `MAX_DEPTH` deep.
    """
    try:
        found = json.loads(text, parse_int=_whole)
        opening: Any = "[{" if isinstance(text, str) else (b"[", b"{")
        if sum(map(text.count, opening)) > MAX_DEPTH:
            _check_depth(found)
        return found
    except (ValueError, RecursionError) as problem:
        raise error(f"not JSON: {getattr(problem, 'msg', problem)}", where=where) from problem


def whole_lines(
    path: Path, error: type[PosttrainError] = DataError, *, unfinished: bool = False
) -> Iterator[tuple[str, str]]:
    """The lines of a file with their places. An unfinished last one is left out: a killed process leaves one.

    Args:
        path: of the file.
        error: what is raised.
        unfinished: give the last line also where it has no end.

    Raises:
        error: a line is larger than `MAX_LINE`.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise error(f"the line is larger than {MAX_LINE // 2**20} MiB", where=f"{path}:{number}")
            if unfinished or line.endswith(b"\n"):
                yield line.removesuffix(b"\n").decode("utf-8", errors="replace"), f"{path}:{number}"


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"the whole number {digits[:20]}{'...' if len(digits) > 20 else ''} has more than 64 bits")
    return int(digits)


def _check_depth(value: Any) -> None:
    waiting = [value]
    for _ in range(MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in waiting if isinstance(part, dict | list)]
        waiting = [inner for part in parts for inner in part]
        if not waiting:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")
