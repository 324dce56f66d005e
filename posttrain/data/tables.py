"""Rows that stay on the disk and are read by number, for sets that are larger than memory.

What can be read so: JSON Lines by the places of its lines, which one pass over the file finds; Arrow files, mapped into
memory; Parquet and data sets of the Hub through the Arrow files that `datasets` makes of them in its cache. Packed
files, CSV and JSON lists cannot.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posttrain.data import files, hub
from posttrain.data.folders import folder_files
from posttrain.data.messages import without_filled
from posttrain.data.sample import Row
from posttrain.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

BY_NUMBER = (".jsonl", ".arrow", ".parquet")
"""Files whose rows can be read by number."""

_CHUNK = 8 * 2**20
"""Bytes that are looked through at once."""


class Table(Protocol):
    """Rows by number.

    Attributes:
        digest: SHA-256 of what the rows are, hexadecimal.
    """

    digest: str

    def __len__(self) -> int: ...

    def row(self, number: int) -> Row:
        """One row, read now.

        Raises:
            DataError: the row cannot be read.
        """


def open_files(paths: Sequence[Path]) -> Table:
    """The rows of these files, one file after another.

    Raises:
        DataError: a file of a kind that cannot be read by number, missing, empty or damaged.
    """
    tables: list[Table] = []
    for path in paths:
        kind = files.extension(path)
        if kind not in BY_NUMBER:
            raise DataError(
                f"rows of a {kind or path.suffix} file cannot be read one at a time, as they are needed",
                where=str(path),
                hint="unpack it, or make one of " + ", ".join(BY_NUMBER) + " of it; or leave `data.streaming` out",
            )
        files.check_exists(path)
        table = Lines(path) if kind == ".jsonl" else ArrowTable.of_file(path, kind)
        if not len(table):
            raise DataError("the file has no rows", where=str(path))
        tables.append(table)
    return tables[0] if len(tables) == 1 else Joined(tables)


def paths_of(path: str, split: str | None, name: str | None) -> list[Path]:
    """The files that a local path stands for."""
    expanded = Path(path).expanduser()
    return folder_files(expanded, split, name, files.known_extensions()) if expanded.is_dir() else [expanded]


class Lines:
    """A JSON Lines file. Eight bytes of memory a row; blank lines are no rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        digest, ends, size = hashlib.sha256(), [], 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (size + 1))
                size += len(chunk)
        self.digest = digest.hexdigest()
        found = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
        self._bounds = found if found[-1] == size else np.append(found, size)
        filled = np.diff(self._bounds) > len("\r\n")
        self._lines = None if filled.all() else np.flatnonzero(filled)
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._bounds) - 1 if self._lines is None else len(self._lines)

    def row(self, number: int) -> Row:
        line = number if self._lines is None else int(self._lines[number])
        start, end = int(self._bounds[line]), int(self._bounds[line + 1])
        data = os.pread(self._file.fileno(), min(end - start, files.MAX_ROW_BYTES + 1), start)
        return files.json_row(data, self.path, line + 1)


class ArrowTable:
    """A table that is mapped into memory."""

    def __init__(self, rows: Dataset, name: str, digest: str) -> None:
        self._rows, self._name, self.digest = rows, name, digest

    @classmethod
    def of_file(cls, path: Path, kind: str) -> ArrowTable:
        """The table of a local file.

        Raises:
            DataError: the file cannot be read.
        """
        import datasets
        import pyarrow

        try:
            if kind == ".parquet":
                rows = datasets.Dataset.from_parquet(str(path))
            else:
                rows = datasets.Dataset(datasets.table.MemoryMappedTable(_mapped(path), str(path)))
        except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError) as error:
            raise DataError(f"not {kind.removeprefix('.').capitalize()}: {error}", where=str(path)) from error
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(rows, str(path), digest)

    @classmethod
    def of_hub(cls, path: str, name: str | None, *, split: str, revision: str | None, offline: bool) -> ArrowTable:
        """The table of a data set of the Hub.

        Raises:
            DataError: as `hub.open_split`.
        """
        rows = hub.open_split(path, name, split=split, revision=revision, offline=offline)
        # Of a set in the cache of `datasets` the fingerprint is made of the files that it came from.
        return cls(rows, f"{path}[{split}]", hashlib.sha256(rows._fingerprint.encode()).hexdigest())

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Row:
        values: dict[str, Any] = self._rows[number]
        return Row(without_filled(values), f"{self._name} row {number}")


class Joined:
    """Tables one after another."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables
        self._starts = np.cumsum([0, *(len(table) for table in tables)])
        self.digest = hashlib.sha256(" ".join(table.digest for table in tables).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> Row:
        table = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._tables[table].row(number - int(self._starts[table]))


def _mapped(path: Path) -> Any:
    """`datasets` writes the stream form, others the file form."""
    import pyarrow

    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()
