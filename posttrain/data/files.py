"""Rows of local files: JSON Lines, JSON (a list of objects), CSV, Parquet and Arrow; the text formats also gzipped.

Every row knows its place. JSON Lines and CSV rows carry the real line number of the file, also after a quoted CSV field
that spans lines; those of the others their index, from 0. Text is UTF-8, with or without a byte order mark.
All but JSON are read as a stream, so that a limit of N rows reads N rows; a JSON file is read whole.

A folder gives the rows of its data files of one split; `data.folders` has the rules.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from posttrain.data.columnar import batches, bomb, unpacked_limit
from posttrain.data.folders import folder_files
from posttrain.data.messages import without_filled
from posttrain.data.readers import READERS, own_rows
from posttrain.data.sample import Row
from posttrain.errors import DataError, nearest

MAX_ROW_BYTES = 16 * 2**20
"""A longer row of a text format is refused: it is a broken file, not a sample, and would fill the memory."""

TEXT_FORMATS = (".jsonl", ".json", ".csv")
EXTENSIONS = (*TEXT_FORMATS, ".parquet", ".arrow", *(f"{ext}.gz" for ext in TEXT_FORMATS))
"""What is built in; plugins add more (`data.readers`)."""

_MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""

_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(
    path: str | Path, *, split: str | None = None, name: str | None = None, limit: int | None = None
) -> list[Row]:
    """The rows of a file or of a folder of files.

    Args:
        path: a file with one of `known_extensions`, or a folder; `~` is expanded.
        split: which files of a folder; None reads all.
        name: which configuration of a folder, where it has several.
        limit: read the first N rows only.

    Raises:
        DataError: missing or empty file, unknown extension, or a bad row; names file, line and column.
    """
    return list(islice(iter_rows(path, split=split, name=name), limit))


def iter_rows(path: str | Path, *, split: str | None = None, name: str | None = None) -> Iterator[Row]:
    """The same one row at a time."""
    path = Path(path).expanduser()
    for file in folder_files(path, split, name, known_extensions()) if path.is_dir() else [path]:
        empty = True
        for row in _file_rows(file):
            empty = False
            yield row
        if empty:
            raise DataError("the file has no rows", where=str(file))


def known_extensions() -> tuple[str, ...]:
    """Everything that can be read."""
    return (*EXTENSIONS, *READERS)


def extension(path: str | Path) -> str | None:
    """The known extension of a path, or None."""
    name = Path(path).name.lower()
    return max((ext for ext in known_extensions() if name.endswith(ext)), key=len, default=None)


def check_exists(file: Path) -> None:
    """Refuse a path that is no plain file.

    Raises:
        DataError: there is no such file (names the nearest), or something else of that name.
    """
    if not file.exists():
        raise _missing(file)
    if not file.is_file():
        raise DataError("this is no plain file", where=str(file))


def _file_rows(file: Path) -> Iterator[Row]:
    check_exists(file)
    kind = extension(file)
    if kind is None:
        raise DataError(
            f"unknown extension {''.join(file.suffixes[-2:])!r}",
            where=str(file),
            hint="known: " + ", ".join(known_extensions()),
        )
    if kind in (".parquet", ".arrow"):
        yield from _typed(file, kind)
        return
    if kind in READERS:
        yield from own_rows(file, kind)
        return
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[kind.removesuffix(".gz")]
    try:
        packed = kind.endswith(".gz")
        with cast(BinaryIO, _Unpacked(file)) if packed else file.open("rb") as handle:
            yield from read(handle, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"damaged gzip data: {error}", where=str(file)) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(file)) from error


class _Unpacked(gzip.GzipFile):
    """A gzipped file; raises `DataError` once it has become too large for what it is."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, "rb")
        self._file, self._limit = file, unpacked_limit(file)

    def read(self, size: int | None = -1) -> bytes:
        parts: list[bytes] = []
        while size is None or size < 0:
            part = self._counted(super().read(1 << 20))
            if not part:
                return b"".join(parts)
            parts.append(part)
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, part: bytes) -> bytes:
        if self.tell() > self._limit:
            raise bomb(self._file, self._limit)
        return part


def _missing(file: Path) -> DataError:
    if not file.parent.is_dir():
        return DataError(f"no folder {str(file.parent)!r}", where=str(file))
    names = [other.name for other in file.parent.iterdir() if other.is_dir() or extension(other)]
    return DataError("no such file", where=str(file), hint=nearest(file.name, names))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} is not UTF-8", where=where, hint="convert the file to UTF-8"
        ) from error


def _lines(handle: BinaryIO, file: Path) -> Iterator[str]:
    number = 0
    while line := handle.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise _too_large(f"{file}:{number}")
        yield _decode(line.removeprefix(_MARK) if number == 1 else line, f"{file}:{number}")


def _too_large(where: str) -> DataError:
    return DataError(f"the row is larger than {MAX_ROW_BYTES // 2**20} MiB", where=where)


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"the row is a {type(value).__name__}, not an object with columns", where=where)
    return Row(value, where)


def _jsonl(handle: BinaryIO, file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(handle, file), start=1):
        if line.strip():
            yield _json_line(line, file, number)


def json_row(data: bytes, file: Path, number: int) -> Row:
    """The row of one line of a JSON Lines file, from its bytes and its number from 1.

    Raises:
        DataError: it is none.
    """
    if len(data) > MAX_ROW_BYTES:
        raise _too_large(f"{file}:{number}")
    return _json_line(_decode(data.removeprefix(_MARK) if number == 1 else data, f"{file}:{number}"), file, number)


def _json_line(line: str, file: Path, number: int) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        # Beside syntax errors: a number of too many digits, and objects nested too deeply.
        column = getattr(error, "colno", 1)
        raise DataError(f"not JSON: {getattr(error, 'msg', error)}", where=f"{file}:{number}:{column}") from error
    return _object(value, f"{file}:{number}")


def _json(handle: BinaryIO, file: Path) -> Iterator[Row]:
    text = _decode(handle.read().removeprefix(_MARK), str(file))
    decoder, position, index = json.JSONDecoder(), _skip(text, 0), 0
    if not text[position:]:
        return
    if text[position] != "[":
        hint = "JSON Lines (one object per line) are read from .jsonl files" if text[position] == "{" else ""
        raise DataError("the file is not a list of objects", where=f"{file}:1", hint=hint)
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]" or index:
        start = position
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            reason, at = getattr(error, "msg", error), getattr(error, "pos", start)
            raise DataError(f"row {index} is not JSON: {reason}", where=_place(file, text, at)) from error
        if position - start > MAX_ROW_BYTES:
            raise _too_large(f"{file} row {index}")
        yield _object(value, f"{file} row {index}")
        index, position = index + 1, _skip(text, position)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise DataError(f"no ',' or ']' after row {index - 1}", where=_place(file, text, position))
        position = _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if text[rest:]:
        raise DataError("text after the end of the list", where=_place(file, text, rest))


def _skip(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return position if space is None else space.end()


def _place(file: Path, text: str, position: int) -> str:
    return f"{file}:{text.count(chr(10), 0, position) + 1}:{position - text.rfind(chr(10), 0, position)}"


def _csv(handle: BinaryIO, file: Path) -> Iterator[Row]:
    # The limit of the csv module is one number for the whole process; a larger one does no harm to others.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    reader = csv.reader(_lines(handle, file), strict=True)
    header: list[str] | None = None
    first_line = 1
    try:
        for fields in reader:
            where, first_line = f"{file}:{first_line}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _header(fields, where)
                continue
            if len(fields) != len(header):
                raise DataError(f"{len(fields)} fields, but the header names {len(header)} columns", where=where)
            if sum(map(len, fields)) > MAX_ROW_BYTES:
                raise _too_large(where)
            yield Row(dict(zip(header, fields, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{file}:{first_line}") from error


def _header(fields: list[str], where: str) -> list[str]:
    names = [name.strip() for name in fields]
    for index, name in enumerate(names):
        if not name:
            raise DataError(f"column {index + 1} of the header has no name", where=where)
        if name in names[:index]:
            raise DataError(f"the header names the column {name!r} twice", where=where)
    return names


def _typed(file: Path, kind: str) -> Iterator[Row]:
    import pyarrow

    index, name = 0, kind.removeprefix(".").capitalize()
    try:
        for batch in batches(file, kind):
            large = batch.nbytes > MAX_ROW_BYTES
            for values in batch.to_pylist():
                if large and _text_size(values) > MAX_ROW_BYTES:
                    raise _too_large(f"{file} row {index}")
                yield Row(without_filled(values), f"{file} row {index}")
                index += 1
    # Names, dates and zones of time that are none too.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        read = f" row {index} or later" if index else ""
        raise DataError(f"{'damaged' if read else 'not'} {name}: {error}", where=f"{file}{read}") from error


def _text_size(value: Any) -> int:
    """Characters and bytes of all text within a value."""
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    if isinstance(value, list):
        return sum(map(_text_size, value))
    return len(value) if isinstance(value, str | bytes) else 0
