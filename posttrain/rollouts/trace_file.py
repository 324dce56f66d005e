"""The append-only file that traces are collected in: whole lines or none, synced, by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.data.files import iter_rows
from posttrain.data.traces import Manifest, Trace, manifest_path, parse_trace, pictured, read_manifest
from posttrain.errors import RecipeError, StateError
from posttrain.safe_files import file_atomic, open_plain, sync_folder, write_json_atomic


class TraceFile:
    """An open trace file. What an earlier process left in it is kept; a line that it did not finish is removed.

    Args:
        path: ends in .jsonl.
        manifest: of the traces to come; an existing file must have the same one.

    Raises:
        RecipeError: another extension.
        StateError: the file was made with other settings (names them), has no manifest, or is being written to.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        if path.suffix != ".jsonl":
            raise RecipeError("traces are collected in a .jsonl file", where="output", hint=f"{path.stem}.jsonl")
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if manifest_path(path).exists():
            _check_same(read_manifest(path), manifest, path)
        elif path.exists() and path.stat().st_size:
            raise StateError(
                "this file has no manifest, so it is none that can be gone on with",
                where=str(path),
                hint="choose another `output`, or move it away",
            )
        self._file = open(path, "ab+", opener=open_plain)
        try:
            # A record lock: worker processes that outlive a killed run do not hold it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.close()
            raise StateError("another process writes to this file", where=str(path)) from None
        if not manifest_path(path).exists():
            write_json_atomic(manifest_path(path), asdict(manifest))
        self._remove_unfinished_line()
        sync_folder(path.parent)

    def traces(self) -> list[Trace]:
        """What stands in the file."""
        if not self.path.stat().st_size:
            return []
        return [parse_trace(row.values, row.where) for row in iter_rows(self.path)]

    def append(self, traces: Iterable[Trace]) -> None:
        """Add traces; they are on the disk when this returns, with their pictures beside them."""
        traces = list(traces)
        for texts in filter(None, map(pictured, traces)):
            from posttrain.data.pictures import folder_beside, put_beside

            put_beside(texts, folder_beside(self.path))
        self._file.write("".join(trace.to_json() + "\n" for trace in traces).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def sort(self, keys: Sequence[Any]) -> None:
        """Put the rows into the order of their keys, by a rename; nothing is written where they stand so already.

        The file is then read only: a later append would go to the one that was replaced.

        Args:
            keys: of all rows, in the order in which they stand.
        """
        order = sorted(range(len(keys)), key=keys.__getitem__)
        if order == list(range(len(keys))):
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        with file_atomic(self.path) as beside:
            beside.write_bytes(b"".join(lines[place] for place in order))

    def close(self) -> None:
        self._file.close()

    def _remove_unfinished_line(self) -> None:
        size = end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)


def _check_same(there: Manifest, wanted: Manifest, path: Path) -> None:
    if there.id == wanted.id:
        return
    old, new = asdict(there), asdict(wanted)
    different = [
        f"{name}: {_short(old[name])} there, {_short(new[name])} now"
        for name in old
        if name not in ("id", "versions") and old[name] != new[name]
    ]
    raise StateError(
        "this file was made with other settings: " + "; ".join(different),
        where=str(path),
        hint="choose another `output`, or move the file and its manifest away",
    )


def _short(value: Any, length: int = 120) -> str:
    text = str(value)
    return text if len(text) <= length else text[:length] + "..."
