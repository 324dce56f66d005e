"""Rows that are read, rendered and counted when a step asks for them, for sets that would not fit into memory.

A run sees the same as of rows that are all rendered before its first step, a sequence of samples with a length, so that
order and mixture are the same functions of seed and step, shuffled over the whole set, and a resumed run finds the same
rows without a cursor. What differs:

- A row that cannot be used has another one in its place: of the same source, drawn by the seed and the number of the
  row. Which row a number stands for is a function of data and seed.
- Of a conversation that gives several sequences (a template that renders earlier turns otherwise), one is taken, drawn
  in the same way.
- What was lost is counted as rows are read, each time one is. Before the first step a number of rows evenly spread over
  each source is rendered, so that a set that does not suit is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from posttrain.config.mixtures import parts
from posttrain.config.schema import DataConfig, FileSource, Recipe
from posttrain.data import files, tables
from posttrain.data.bad_rows import BadRows, count_bad
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Sample
from posttrain.data.sources import ExampleTable, is_local, local_files
from posttrain.data.truncation import Ledger, LengthLimits, fit_sample, fit_sequences
from posttrain.errors import DataError, NeedsError

LARGE = 64 * 2**20
"""Bytes of files from which rows are read as they are needed, unless the recipe says otherwise: some 50,000 rows of 300
tokens, which take about a minute to render and a gigabyte to keep."""

PROBED = 256
"""Rows of each source that are rendered before the first step."""

JUDGED_FROM = 1000
"""Rows read of a source from which the lost share ends a run."""

LEARNT_FROM = 20_000
"""Rows that a tokenizer of the run's own is learnt from."""


def wants_streaming(recipe: Recipe, section: str) -> bool:
    """Whether the rows of a section are read as they are needed: as the recipe says, else by the size of its files.

    Raises:
        NeedsError: the recipe says so, and there is a source that is made here.
    """
    sources = parts(getattr(recipe.data, section), section)
    made = next((name for name, source in sources if not isinstance(source, FileSource)), None)
    if recipe.data.streaming and made is not None:
        raise NeedsError(
            "problems that are made here are not read from files, so they cannot be streamed",
            where=f"data.{section}: {made}",
            hint="leave `data.streaming` out",
        )
    if recipe.data.streaming is not None or made is not None:
        return bool(recipe.data.streaming)
    return all(source.limit is None and is_local(source.path) for _, source in sources) and _large(sources)


def _large(sources: Sequence[tuple[str, FileSource]]) -> bool:
    paths = [path for name, source in sources for path in local_files(source, name)]
    by_number = all(files.extension(path) in tables.BY_NUMBER and path.is_file() for path in paths)
    return by_number and sum(path.stat().st_size for path in paths) > LARGE


class StreamedRows(Sequence[Example]):
    """The examples of several sources, one after another; rows that cannot be used are passed over by slices.

    Args:
        sources: as `config.mixtures.parts` gives them.
        offline: read Hub data from the local cache only.
    """

    def __init__(self, sources: Iterable[tuple[str, FileSource]], *, offline: bool = False) -> None:
        self.tables = {name: ExampleTable(source, name, offline=offline) for name, source in sources}
        ends = np.cumsum([len(table) for table in self.tables.values()]).tolist()
        self.ranges = {
            name: range(end - len(table), end) for (name, table), end in zip(self.tables.items(), ends, strict=True)
        }

    @property
    def digests(self) -> dict[str, str]:
        """What stands in the files of each source."""
        return {name: table.digest for name, table in self.tables.items()}

    def source(self, index: int) -> str:
        """The source of a row.

        Raises:
            IndexError: there are not so many rows.
        """
        for name, numbers in self.ranges.items():
            if index in numbers:
                return name
        raise IndexError(f"row {index} of {len(self)}")

    def __len__(self) -> int:
        return sum(len(numbers) for numbers in self.ranges.values())

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return list(self._usable(range(*index.indices(len(self)))))
        name = self.source(index)
        return self.tables[name].example(index - self.ranges[name].start)

    def _usable(self, indices: Iterable[int]) -> Iterator[Example]:
        for index in indices:
            try:
                yield self[index]
            except DataError:
                continue


class StreamedSamples(Sequence[Sample]):
    """Rows as token ids within the limits, by their number; each is read and rendered when it is asked for.

    Args:
        rows: of the data section.
        renderer: with the policy's tokenizer.
        data: limits, and what happens to rows beyond them or bad ones.
        max_length: tokens of a whole sequence; None is no limit.
        seed: of the run.

    Attributes:
        probe: usable samples of rows spread over each source.
        probe_ledger: what became of these.

    Raises:
        DataError: more of the probed rows are lost than the limits allow, or none can be used.
    """

    def __init__(
        self, rows: StreamedRows, renderer: Renderer, data: DataConfig, max_length: int | None, seed: int
    ) -> None:
        self.rows, self._renderer, self._bad_rows, self._seed = rows, renderer, data.bad_rows, seed
        self._rules = (data.max_prompt_length, max_length, data.too_long, data.max_lost_share)
        self._limits = {name: LengthLimits(*self._rules, Ledger()) for name in rows.ranges}
        probed = {name: self._probed(name, numbers) for name, numbers in rows.ranges.items()}
        self.probe = [sample for samples, _ in probed.values() for sample in samples]
        self.probe_ledger = _together({name: ledger for name, (_, ledger) in probed.items()})

    @property
    def ranges(self) -> dict[str, range]:
        """The numbers of each source's rows."""
        return self.rows.ranges

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """What became of the rows of each source that were read so far."""
        return {name: limits.ledger for name, limits in self._limits.items()}

    def set_ledgers(self, ledgers: Mapping[str, Ledger]) -> None:
        """Go on counting from these."""
        for name, limits in self._limits.items():
            limits.ledger = ledgers[name]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        name = self.rows.source(index)
        numbers, draw = self.ranges[name], np.random.default_rng([self._seed, index])
        sample = self._sample(index, name, draw)
        while sample is None:
            sample = self._sample(numbers.start + int(draw.integers(len(numbers))), name, draw)
        return sample

    def _sample(self, index: int, name: str, draw: np.random.Generator) -> Sample | None:
        """The sample of a row, counted; None if the row cannot be used.

        Raises:
            DataError: too many rows of the source are lost, or `bad_rows` or `too_long` say so.
        """
        limits = self._limits[name]
        try:
            made = self._renderer.samples(self.rows[index])
        except DataError as error:
            if self._bad_rows == "error":
                raise
            count_bad(limits.ledger, error, name)
            sample = None
        else:
            one = made[0] if len(made) == 1 else made[int(draw.integers(len(made)))]
            sample = fit_sample(one, limits, self._renderer.head_ids)
        if limits.ledger.total >= JUDGED_FROM:
            limits.check(left=1)
        return sample

    def _probed(self, name: str, numbers: range) -> tuple[list[Sample], Ledger]:
        spread = np.linspace(numbers.start, numbers.stop - 1, min(PROBED, len(numbers))).astype(int)
        bad = BadRows(self._bad_rows)
        if (note := self.rows.tables[name].note) is not None:
            bad.note(name, note)
        made = bad.made(spread.tolist(), lambda index: self._renderer.samples(self.rows[index]), name)
        return fit_sequences(made, *self._rules, head_ids=self._renderer.head_ids, ledger=bad.ledger(name))


def at_hand(items: Sequence[Any]) -> Sequence[Any]:
    """The rows that are rendered already: all of them, or the probed ones where they are read as they are needed."""
    return items.probe if isinstance(items, StreamedSamples) else items


def added(ledgers: Iterable[Mapping[str, Ledger]]) -> Ledger:
    """The ledgers of each source, of several ranks say, as one."""
    found: dict[str, Ledger] = {}
    for by_source in ledgers:
        for name, ledger in by_source.items():
            found.setdefault(name, Ledger()).count(ledger)
    return _together(found)


def _together(ledgers: Mapping[str, Ledger]) -> Ledger:
    if len(ledgers) == 1:
        return next(iter(ledgers.values()))
    whole = Ledger()
    for name, ledger in ledgers.items():
        whole.add(name, ledger)
    return whole


def identity(rows: Sequence[Any]) -> Sequence[Any]:
    """What the hash of a run's rows is made of: the rows, or the digests of their files."""
    return list(rows.digests.values()) if isinstance(rows, StreamedRows) else rows
