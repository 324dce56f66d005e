"""Batches of Parquet and Arrow files, which may be anybody's, small enough to become Python objects.

In both formats a few bytes can stand for any amount of memory: packed columns, one long text that all rows have, runs
of nulls. What a file says of its sizes is read before its columns are, and what a batch would be in Python
before it is that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

MAX_UNPACKED = 64 * 2**20, 200
"""A gzipped file, or the columns of a Parquet or Arrow file, may become this many bytes, or this many times its size if
that is more. Rows of text pack at most some 50 to 1; one that packs better is made to fill the memory."""

MAX_DECODED = 2**30, 200
"""The same of the values of a Parquet or Arrow file, of which many may be one text that it has once."""

MAX_BATCH_BYTES = 64 * 2**20
"""About how much a batch, and so a row, may be as Python objects."""

BATCH = 1024
"""Rows of a batch, at most."""

NULL = 8
"""Bytes of a list's item in Python, whatever it is."""


def unpacked_limit(file: Path, bounds: tuple[int, int] | None = None) -> int:
    """Bytes that a file may become."""
    least, ratio = bounds or MAX_UNPACKED
    return max(least, ratio * file.stat().st_size)


def bomb(file: Path, limit: int) -> DataError:
    """The error for a file that becomes more."""
    size = f"{file.stat().st_size:,} bytes become more than {limit:,}"
    return DataError(f"packed beyond what rows of text are: {size}", where=str(file), hint="unpack it, and look at it")


def batches(file: Path, kind: str) -> Iterator[Any]:
    """Record batches of a `.parquet` or `.arrow` file, in its order.

    Raises:
        DataError: the file would fill the memory, or a row is too large.
        pyarrow.ArrowException: it is damaged.
    """
    row, decoded, limit = 0, 0, unpacked_limit(file, MAX_DECODED)
    for batch in _parquet(file) if kind == ".parquet" else _arrow(file):
        if kind == ".arrow":
            batch.validate(full=True)  # else a text is whatever lies in memory where the file says it does
        decoded += _batch_size(batch)
        if decoded > limit:
            raise bomb(file, limit)
        for piece in _pieces(batch):
            if piece.num_rows == 1 and _batch_size(piece) > MAX_BATCH_BYTES:
                raise DataError(f"the row is larger than {MAX_BATCH_BYTES // 2**20} MiB", where=f"{file} row {row}")
            row += piece.num_rows
            yield piece


def _parquet(file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        # A run of nulls takes no bytes there and some here.
        if sum(max(each.total_uncompressed_size, each.num_values) for each in columns) > unpacked_limit(file):
            raise bomb(file, unpacked_limit(file))
        # Every value may be the one text that a column has, as long as all of it.
        longest = max((each.total_uncompressed_size for each in columns), default=0)
        yield from table.iter_batches(batch_size=min(max(MAX_DECODED[0] // max(longest, 1), 16), BATCH))


def _arrow(file: Path) -> Iterator[Any]:
    """`datasets` writes the stream form, others the file form."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        source.seek(8 if source.read(6) == b"ARROW1" else 0)  # behind this mark the file form is the other
        size = sum(_unpacked_size(message) for message in pyarrow.ipc.MessageReader.open_stream(source))
        if size > unpacked_limit(file):
            raise bomb(file, unpacked_limit(file))
        source.seek(0)
        try:
            reader = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            whole = pyarrow.ipc.open_file(source)
            yield from (whole.get_batch(number) for number in range(whole.num_record_batches))
            return
        yield from reader


def _unpacked_size(message: Any) -> int:
    """Bytes that the packed buffers of a message become, which stand before each; 0 where nothing is packed.

    A message's head is a table of Flatbuffers: the Message has its kind and its header, a RecordBatch its buffers and
    how they are packed, a DictionaryBatch a RecordBatch (Message.fbs of Apache Arrow).
    """
    if message.body is None:
        return 0
    head, body = message.metadata.to_pybytes(), memoryview(message.body)
    try:
        (root,) = struct.unpack_from("<I", head)
        (kind,) = struct.unpack_from("<B", head, _field(head, root, 1) or 0)
        batch = _table(head, root, 2)
        batch = batch and (_table(head, batch, 1) if kind == 2 else batch)
        if not batch or kind not in (2, 3) or not _field(head, batch, 3):
            return 0
        buffers = _table(head, batch, 2)
        (count,) = struct.unpack_from("<I", head, buffers)
        places = [struct.unpack_from("<qq", head, buffers + 4 + 16 * number) for number in range(count)]
        return sum(max(struct.unpack_from("<q", body, start)[0], 0) for start, length in places if length >= 8)
    except struct.error as error:
        raise DataError(f"not Arrow: {error}") from error


def _field(head: bytes, table: int, number: int) -> int | None:
    """Where a field of a table lies; None if the table has none."""
    (back,) = struct.unpack_from("<i", head, table)
    (size,) = struct.unpack_from("<H", head, table - back)
    if 4 + 2 * number >= size:
        return None
    (offset,) = struct.unpack_from("<H", head, table - back + 4 + 2 * number)
    return table + offset if offset else None


def _table(head: bytes, table: int, number: int) -> int | None:
    """Where that which a field points to lies."""
    place = _field(head, table, number)
    return None if place is None else place + struct.unpack_from("<I", head, place)[0]


def _pieces(batch: Any) -> Iterator[Any]:
    """A batch cut until every part is small, or a row."""
    for start in range(0, batch.num_rows, BATCH):
        waiting = [batch.slice(start, BATCH)]
        while waiting:
            piece = waiting.pop()
            half = piece.num_rows // 2
            if half and _batch_size(piece) > MAX_BATCH_BYTES:
                waiting += [piece.slice(half), piece.slice(0, half)]
            else:
                yield piece


def _batch_size(batch: Any) -> int:
    return sum(map(_size, batch.columns))


def _size(array: Any) -> int:
    """About how many bytes an array is as Python objects, counted without making them.

    Raises:
        pyarrow.ArrowNotImplementedError: of a type whose values may all be one that the file has once.
    """
    import numpy
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _size(array.storage)
    if types.is_string_view(kind) or types.is_binary_view(
        kind
    ):  # each 16 bytes, of which the first four are its length
        views = numpy.frombuffer(array.buffers()[1], numpy.int32).reshape(-1, 4)
        lengths = views[array.offset : array.offset + len(array), 0]
        return NULL * len(array) + int(lengths.sum(dtype=numpy.int64))
    if (
        types.is_list_view(kind)
        or types.is_large_list_view(kind)
        or types.is_run_end_encoded(kind)
        or types.is_union(kind)
    ):
        raise pyarrow.ArrowNotImplementedError(
            f"a column of type {kind}, which is not read; write it as plain lists or texts"
        )
    if types.is_dictionary(kind):
        values = array.dictionary
        if types.is_string(values.type) or types.is_large_string(values.type) or types.is_binary(values.type):
            lengths = compute.binary_length(values).take(array.indices)
            return NULL * len(array) + (compute.sum(lengths).as_py() or 0)
        return len(array) * max(_size(values), NULL)
    if types.is_struct(kind):
        return NULL * len(array) + sum(map(_size, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        items = array.offsets[-1].as_py() - array.offsets[0].as_py()
        inner = (array.keys, array.items) if types.is_map(kind) else (array.flatten(),)
        return NULL * (len(array) + items) + sum(map(_size, inner))
    if types.is_fixed_size_list(kind):
        return NULL * len(array) * (1 + kind.list_size) + _size(array.flatten())
    return max(array.nbytes, NULL * len(array))
