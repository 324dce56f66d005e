"""Finished cells of a benchmark as one file, and from there back into its folder.

A benchmark keeps a JSON file per cell, which it does not make again. `--save FILE` writes them all as one list, small
enough to be kept with the code; `--load FILE` lays those that are missing back, so that somebody else can report on
them or add seeds without the runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.safe_files import write_json_atomic, write_text_atomic

Cell = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=Path, help="lay the cells of this file into the output folder first")
    parser.add_argument("--save", type=Path, help="write all finished cells to this file at the end")


def load(file: Path | None, place: Callable[[Cell], Path]) -> None:
    """Write the cells of a saved file, but those that are there.

    Args:
        file: None does nothing.
        place: where a cell belongs.
    """
    if file is None:
        return
    for cell in json.loads(file.read_text(encoding="utf-8")):
        if not place(cell).exists():
            write_json_atomic(place(cell), cell)


def save(file: Path | None, folder: Path, pattern: str, place: Callable[[Cell], Path]) -> None:
    """Write the cells under a folder as one list; other JSON files that the pattern finds are left out."""
    if file is None:
        return
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))}
    rows = [json.dumps(cell) for path, cell in found.items() if "seed" in cell and place(cell) == path]
    write_text_atomic(file, "[\n" + ",\n".join(rows) + "\n]\n")  # a line each, for readable changes
