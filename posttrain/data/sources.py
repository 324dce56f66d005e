"""From a recipe's data source to typed problems and examples.

Where a path leads: what exists on this machine, or ends in a data extension, or is written like a local path, is read
as a local file or folder; all else must look like a Hub id, `name` or `owner/name`.

What is made of a row is in `row_builder`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.relative_paths import nearest_local
from posttrain.config.schema import FileSource, GymSource, Source, TaskSource
from posttrain.data import columns, files, hub
from posttrain.data.bad_rows import BadRows
from posttrain.data.formats import (
    COLUMNS,
    KINDS,
    Format,
    check_labels,
    detect_completions,
    is_grade,
    kind_of,
)
from posttrain.data.preferences import check_roles
from posttrain.data.repeated_prompts import RepeatedPrompts, spread
from posttrain.data.row_builder import RowBuilder
from posttrain.data.sample import Example, Preference, Problem, Row, Stepwise, Unpaired
from posttrain.data.tables import ArrowTable, Table, open_files, paths_of
from posttrain.errors import DataError, RecipeError

T = TypeVar("T")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def problems(source: Source, name: str, *, offline: bool = False, bad: BadRows | None = None) -> list[Problem]:
    """The problems of a source, in its order.

    Args:
        source: a source section of the recipe.
        name: name of the source; the first part of each problem's id, `name/row number` from 0.
        offline: read Hub data from the local cache only.
        bad: takes the rows that cannot be used; None stops at the first one.

    Raises:
        DataError: the data is missing or a row is bad; names file, line and column.
        RecipeError: a template or pattern that cannot be used, or a key without effect.
    """
    if isinstance(source, TaskSource):
        from posttrain.data.tasks import generate_problems

        return generate_problems(source, name)
    if isinstance(source, GymSource):
        from posttrain.data.gym import generate_problems as generate_gym_problems

        return generate_gym_problems(source, name)
    build, rows = RowBuilder.of(source, name), _rows(source, name, offline)
    with _of_section("prompts", source, rows):
        return _made(rows, build.problem, source, name, bad)


def examples(source: Source, name: str, *, offline: bool = False, bad: BadRows | None = None) -> list[Example]:
    """The problems of a source with their written completions. Arguments and errors as in `problems`.

    Raises:
        RecipeError: the source has no completions.
        DataError: also: neither the recipe nor the columns of the first row say where the completions are.
    """
    if isinstance(source, TaskSource):
        from posttrain.data.tasks import generate_examples

        return generate_examples(source, name)
    if isinstance(source, GymSource):
        raise RecipeError(
            "reasoning-gym generators write no solutions",
            where=name,
            hint="use a `task`, or files with a completion column",
        )
    rows = _rows(source, name, offline)
    with _of_section("completions", source, rows):
        build = RowBuilder.of(source, name, completion_format(source, rows[0]))
        _refuse_labels(source, build.format, rows)
        return _made(rows, partial(build.example, repeated=_repeated(build, rows, bad)), source, name, bad)


def _repeated(build: RowBuilder, rows: Sequence[Row], bad: BadRows | None) -> RepeatedPrompts:
    """Whether completions repeat their prompts; what is to be told of it goes to `bad`."""
    return _told(rows, build.name, bad, build.repeated(len(rows), rows.__getitem__))


def _told(rows: Sequence[Row], name: str, bad: BadRows | None, found: RepeatedPrompts) -> RepeatedPrompts:
    if bad is not None and (note := found.note(rows)) is not None:
        bad.note(name, note)
    return found


class ExampleTable:
    """The problems of a source with their written completions, each read when it is asked for.

    Args:
        source, name, offline: as in `problems`.

    Attributes:
        note: what is to be told of completions that repeat their prompt; None for nothing.

    Raises:
        DataError: the rows cannot be read by number (`data.tables`), or as `examples`.
    """

    def __init__(self, source: FileSource, name: str, *, offline: bool = False) -> None:
        self.source, self.name = source, name
        self._table = _table(source, name, offline)
        self._length = len(self._table) if source.limit is None else min(source.limit, len(self._table))
        self.digest = self._table.digest
        self._build = RowBuilder.of(source, name, completion_format(source, self._table.row(0)))
        looked_at = list(spread(self._length, self._table.row))
        _refuse_labels(source, self._build.format, looked_at)
        self._repeated = self._build.repeated(self._length, self._table.row)
        self.note = self._repeated.note(looked_at)

    def __len__(self) -> int:
        return self._length

    def example(self, number: int) -> Example:
        """One example, read now.

        Raises:
            DataError: the row cannot be used.
        """
        row = self._table.row(number)
        _refuse_labels(self.source, self._build.format, [row])
        return self._build.example(row, number, repeated=self._repeated)


def preferences(source: Source, name: str, *, offline: bool = False, bad: BadRows | None = None) -> list[Preference]:
    """The pairs of a source, all rows; `data.preferences` has the forms. Arguments and errors as in `problems`.

    Rows that say nothing (chosen and rejected the same, an empty reply) are among them; `data.preferences.usable`
    leaves them out and counts them.

    Raises:
        RecipeError: the source has no pairs.
    """
    if not isinstance(source, FileSource):
        raise RecipeError(
            "only files and Hub data sets hold pairs",
            where=name,
            hint="sample completions and make pairs of them: `posttrain sample`, `posttrain prepare pairs`",
        )
    check_roles(source, name)
    build, rows = RowBuilder.of(source, name), _rows(source, name, offline)
    responses = [source.chosen or "chosen", source.rejected or "rejected", *(source.others or {}).values()]
    repeated = _told(rows, name, bad, RepeatedPrompts.of(source.prompt, responses, len(rows), rows.__getitem__))
    with _of_section("preferences", source, rows):
        return _made(rows, partial(build.preference, repeated=repeated), source, name, bad)


def unpaired(source: Source, name: str, *, offline: bool = False, bad: BadRows | None = None) -> list[Unpaired]:
    """The rows of a source with one completion and a label each. Arguments and errors as in `problems`.

    The completion of a conversation is its last assistant turn; what stands before is the prompt.

    Raises:
        RecipeError: the source is no file.
        DataError: also: a label that is neither true nor false.
    """
    file = _file(source, name, "labelled completions")
    rows = _rows(file, name, offline)
    check_labels(rows, file.label or "label")
    build = RowBuilder.of(file, name, _unpaired_format(file, rows[0]))
    with _of_section("unpaired", file, rows):
        return _made(rows, partial(build.unpaired, repeated=_repeated(build, rows, bad)), file, name, bad)


def stepwise(source: Source, name: str, *, offline: bool = False, bad: BadRows | None = None) -> list[Stepwise]:
    """The rows of a source with a solution in labelled steps each. Arguments and errors as in `problems`.

    Raises:
        RecipeError: the source is no file.
    """
    file = _file(source, name, "labelled steps")
    rows = _rows(file, name, offline)
    check_labels(rows, file.label or "labels")
    with _of_section("stepwise", file, rows):
        return _made(rows, RowBuilder.of(file, name).stepwise, file, name, bad)


COLUMN_KEYS = frozenset({"prompt", "completion", "messages", "chosen", "rejected", "label", "steps", "template"})
"""Keys of a source by which a recipe says which columns are meant."""

READERS: dict[str, Callable[..., list]] = {
    "prompts": problems,
    "completions": examples,
    "preferences": preferences,
    "unpaired": unpaired,
    "stepwise": stepwise,
}
"""How the sources of each section of `data` are read."""


def read_kind(source: FileSource, first: Row) -> str:
    """The section of `data` that a source belongs to: by the keys that it gives, else by the columns of its rows."""
    given = source.model_fields_set
    if given & {"chosen", "rejected"}:
        return "preferences"
    if "steps" in given:
        return "stepwise"
    if "label" in given:
        return "unpaired"
    if given & {"completion", "messages"}:
        return "completions"
    return "prompts" if "prompt" in given else kind_of(first.values, first.where)


def first_row(source: FileSource, name: str, *, offline: bool = False) -> Row:
    """The first row of a source."""
    return _rows(source.model_copy(update={"limit": 1}), name, offline)[0]


def _file(source: Source, name: str, what: str) -> FileSource:
    if not isinstance(source, FileSource):
        raise RecipeError(f"only files and Hub data sets hold {what}", where=name, hint="give `path`")
    return source


def is_local(path: str) -> bool:
    """Whether a data path means a file or folder on this machine; see the rule at the top."""
    written_so = path.startswith((".", "/", "~"))
    return written_so or Path(path).exists() or files.extension(path) is not None


def _made(
    rows: Sequence[Row], make: Callable[[Row, int], T], source: FileSource, name: str, bad: BadRows | None
) -> list[T]:
    if source.images is None:
        return _all(rows, make, name, bad)
    from posttrain.data.pictures import Places, folder_of

    places = Places(source, folder_of(source.path) if is_local(source.path) else None)
    made = _all(rows, lambda row, number: make(places(row), number), name, bad)
    # A column that no row has is a name written wrongly, and would train or measure without pictures.
    if rows and not places.named:
        raise columns.missing_column(rows[0], source.images)
    return made


def _all(rows: Sequence[Row], make: Callable[[Row, int], T], name: str, bad: BadRows | None) -> list[T]:
    if bad is None:
        return [make(row, number) for number, row in enumerate(rows)]
    return bad.made(enumerate(rows), lambda pair: make(pair[1], pair[0]), name)


def completion_format(source: FileSource, first: Row) -> Format:
    """How rows with completions are read: as the recipe says, else as the columns of the first row do.

    Raises:
        DataError: the columns say nothing, or too much.
    """
    if source.messages is not None:
        return Format.MESSAGES
    if source.completion is not None:
        return Format.PROMPT_COMPLETION
    return detect_completions(first.values, first.where)


def _refuse_labels(source: FileSource, form: Format, rows: Sequence[Row]) -> None:
    """Refuse completions with labels, unless the recipe names the column that it wants as it is."""
    if source.messages is not None or source.completion is not None:
        return
    if (row := next((row for row in rows if is_grade(row.values.get("label"))), None)) is None:
        return
    plain = {Format.PROMPT_COMPLETION: "completion: completion", Format.ALPACA: "completion: output"}
    key = plain.get(form, f"messages: {min(COLUMNS[form])}")
    raise DataError(
        "the completions have labels: those that somebody found bad would be trained on like the others",
        where=columns.at(row, "label"),
        hint="`posttrain prepare rows DATA --to completions` takes the good ones, `data.unpaired` reads both; "
        f"`{key}`" + (" with a `template`" if form is Format.ALPACA else "") + " takes all of them as they are",
    )


def _unpaired_format(source: FileSource, first: Row) -> Format:
    """How rows with labelled completions are read: a prompt beside a completion, unless there is another form."""
    if source.messages is not None:
        return Format.MESSAGES
    if source.completion is not None or "completion" in first.values:
        return Format.PROMPT_COMPLETION
    others = [name for name in (Format.MESSAGES, Format.SHAREGPT, Format.ALPACA) if COLUMNS[name] <= set(first.values)]
    return detect_completions(first.values, first.where) if others else Format.PROMPT_COMPLETION


@contextmanager
def _of_section(section: str, source: FileSource, rows: Sequence[Row]) -> Iterator[None]:
    """Around reading rows: where their columns are those of another section, an error says so."""
    try:
        yield
    except DataError as error:
        fits = [kind for kind, forms in KINDS.items() if any(form <= set(rows[0].values) for form in forms)]
        if not fits or section in fits or source.model_fields_set & COLUMN_KEYS:
            raise
        raise DataError(error.what, where=error.where, hint=f"rows like these belong to data.{fits[0]}") from error


def _rows(source: FileSource, name: str, offline: bool) -> list[Row]:
    if not is_local(source.path):
        with _of_hub(source, name):
            asked: dict[str, Any] = {"split": source.split, "revision": source.revision, "limit": source.limit}
            return hub.read_rows(source.path, source.name, **asked, offline=offline)
    given = _local(source, name)
    return files.read_rows(source.path, **given, limit=source.limit)


def _table(source: FileSource, name: str, offline: bool) -> Table:
    if not is_local(source.path):
        with _of_hub(source, name):
            asked: dict[str, Any] = {"split": source.split, "revision": source.revision}
            return ArrowTable.of_hub(source.path, source.name, **asked, offline=offline)
    return open_files(local_files(source, name))


def local_files(source: FileSource, name: str) -> list[Path]:
    """The files of a source on this machine.

    Raises:
        DataError: no such split or configuration of a folder.
    """
    return paths_of(source.path, **_local(source, name))


@contextmanager
def _of_hub(source: FileSource, name: str) -> Iterator[None]:
    """Around reading from the Hub: what a path that is none of its ids may have meant."""
    if not _HUB_ID.fullmatch(source.path):
        raise DataError(
            f"{source.path!r} is neither a file or folder here nor a Hub id",
            where=f"{name}.path",
            hint="a Hub id is `owner/name`; files end in " + ", ".join(files.known_extensions()),
        )
    try:
        yield
    except DataError as error:
        if not (near := nearest_local(source.path)):
            raise
        raise DataError(error.what, where=error.where, hint=f"{near} ({error.hint})") from error


def _local(source: FileSource, name: str) -> dict[str, str | None]:
    """Split and configuration of a local path, which only folders have."""
    folder = Path(source.path).expanduser().is_dir()
    for key in ("revision",) if folder else ("name", "revision", "split"):
        if key in source.model_fields_set and getattr(source, key) is not None:
            raise RecipeError(f"`{key}` has no effect on a local file", where=f"{name}.{key}", hint="leave it out")
    return {"split": source.split, "name": source.name if folder else None}
