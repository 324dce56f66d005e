"""From a recipe's data source to typed problems and examples.

Where a path leads: what exists on this machine, or ends in a data extension, or is written like a local path, is read
as a local file or folder; all else must look like a Hub id, `name` or `owner/name`.

How a prompt is rendered, from least to most said in the recipe:

- nothing: a text prompt stays text with `Problem.chat` None; the renderer makes it a user message if the tokenizer has
  a chat template, and plain text otherwise.
- `chat: true` or `chat: false`: the prompt stays text and `Problem.chat` carries the wish. `true` needs a tokenizer
  with a template; the renderer says so if there is none.
- `system`: the prompt becomes messages, the system message first.
- the column holds messages: they are kept. They cannot be combined with `chat: false` or `template`.

`template` is text with the row's columns as `{column}`; `{prompt}` is the prompt column where no column has that name;
`{{` and `}}` are braces. It fills in text and numbers as they are, lists of texts as lines, and nothing else: no
attributes, no format codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.patterns import compiled, find
from posttrain.config.relative_paths import nearest_local
from posttrain.config.schema import FileSource, GymSource, Source, TaskSource
from posttrain.data import columns, files, hub
from posttrain.data.bad_rows import BadRows
from posttrain.data.formats import (
    COLUMNS,
    KINDS,
    Format,
    check_labels,
    conversation,
    detect_completions,
    instruction,
    is_grade,
    kind_of,
    label_of,
    labelled_steps,
    whole_response,
    with_system,
)
from posttrain.data.messages import are_tool_schemas, as_context, tool_schemas
from posttrain.data.preferences import check_roles, parse_row
from posttrain.data.repeated_prompts import RepeatedPrompts, spread
from posttrain.data.sample import Example, Message, Preference, Problem, Row, Stepwise, Unpaired
from posttrain.data.tables import ArrowTable, Table, open_files, paths_of
from posttrain.errors import DataError, RecipeError, nearest

T = TypeVar("T")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


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
    build, rows = _Builder.of(source, name), _rows(source, name, offline)
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
        build = _Builder.of(source, name, completion_format(source, rows[0]))
        _refuse_labels(source, build.format, rows)
        return _made(rows, partial(build.example, repeated=_repeated(build, rows, bad)), source, name, bad)


def _repeated(build: _Builder, rows: Sequence[Row], bad: BadRows | None) -> RepeatedPrompts:
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
        self._build = _Builder.of(source, name, completion_format(source, self._table.row(0)))
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
    build, rows = _Builder.of(source, name), _rows(source, name, offline)
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
    build = _Builder.of(file, name, _unpaired_format(file, rows[0]))
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
        return _made(rows, _Builder.of(file, name).stepwise, file, name, bad)


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
    rows: Iterable[Row], make: Callable[[Row, int], T], source: FileSource, name: str, bad: BadRows | None
) -> list[T]:
    placed = _placed(source)
    if bad is None:
        return [make(placed(row), number) for number, row in enumerate(rows)]
    return bad.made(enumerate(rows), lambda pair: make(placed(pair[1]), pair[0]), name)


def _placed(source: FileSource) -> Callable[[Row], Row]:
    """What puts the pictures of a row where they stand; nothing where a source names none."""
    if source.images is None:
        return lambda row: row
    from posttrain.data.pictures import Places, folder_of

    return Places(source, folder_of(source.path) if is_local(source.path) else None)


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


@dataclass(frozen=True, slots=True)
class _Builder:
    """Makes problems of the rows of one source."""

    source: FileSource
    name: str
    template: Callable[[Row], str] | None
    pattern: re.Pattern[str] | None
    format: Format = Format.PROMPT_COMPLETION

    @classmethod
    def of(cls, source: FileSource, name: str, format: Format = Format.PROMPT_COMPLETION) -> _Builder:
        template = None if source.template is None else _compile_template(source.template, source.prompt, name)
        return cls(source, name, template, _compile_pattern(source, name), format)

    def problem(
        self, row: Row, number: int, prompt: str | tuple[Message, ...] | None = None, read: Collection[str] = ()
    ) -> Problem:
        """The row's problem; `prompt` is given where no column holds it, `read` are columns that are no meta."""
        source = self.source
        # A template makes the prompt of the columns, which then say more than the prompt does: a code verifier, say,
        # runs a completion after the column with the function's head.
        used = {source.completion, *read} if self.template is not None else {source.prompt, source.completion, *read}
        reference = None
        if source.reference is not None:
            reference = self._reference(row, source.reference)
            if self.pattern is None:
                used.add(source.reference)
        asked = self._prompt(row) if prompt is None else prompt
        said = self._said_by_system(row, asked)
        if said is not asked:
            used.add("system")
        return Problem(
            id=f"{self.name}/{number}",
            prompt=self._with_system(said, columns.at(row, source.prompt) if prompt is None else row.where),
            reference=reference,
            tools=self._tools(row, used, talk=not isinstance(asked, str)),
            meta={key: value for key, value in row.values.items() if key not in used},
            where=row.where,
            chat=source.chat,
        )

    def _tools(self, row: Row, used: set[str], *, talk: bool) -> tuple[dict[str, Any], ...]:
        """What the row offers; where no column is named, in one that describes tools and is called as such ones are.

        Args:
            talk: the row holds messages: beside other text `functions` may be anything.
        """
        column = self.source.tools
        if column is None and self.source.chat is not False:
            known = ("tools", "functions") if talk else ("tools",)  # the second beside OpenAI's `function_call`
            column = next((name for name in known if are_tool_schemas(row.values.get(name))), None)
        if column is None:
            return ()
        if column not in row.values:
            raise columns.missing_column(row, column)
        used.add(column)
        return tool_schemas(row.values[column], columns.at(row, column))

    def repeated(self, length: int, row: Callable[[int], Row]) -> RepeatedPrompts:
        """Whether the completions of so many rows, given by their number, repeat their prompts."""
        if self.format is not Format.PROMPT_COMPLETION:
            return RepeatedPrompts(self.source.prompt, (), False)
        return RepeatedPrompts.of(self.source.prompt, [self.source.completion or "completion"], length, row)

    def example(self, row: Row, number: int, *, repeated: RepeatedPrompts) -> Example:
        problem, completion, column = self._example(row, number)
        problem, completion = self._behind_prompt(row, problem, completion, repeated)
        if not isinstance(completion, str) and problem.chat is False:
            raise DataError("`chat: false`, but the completion is chat messages", where=columns.at(row, column))
        return Example(problem, completion if self.source.train_on == "all" else _last_only(completion))

    def _example(
        self, row: Row, number: int, label: str | None = None
    ) -> tuple[Problem, str | tuple[Message, ...], str]:
        """Problem, completion and its column; what a `label` judges is the last turn of a conversation."""
        judged = set() if label is None else {label}
        if self.format in (Format.MESSAGES, Format.SHAREGPT):
            column = self.source.messages or min(COLUMNS[self.format])
            messages, replies = conversation(row, column)
            if label is not None:
                where = columns.at(row, column)
                messages, replies = columns.check_prompt_messages((*messages, *replies[:-1]), where), replies[-1:]
            return self.problem(row, number, messages, {column, "system", *judged}), replies, column
        if self.format is Format.ALPACA:
            said, completion = instruction(row)
            prompt = said if self.template is None else None
            return (
                self.problem(row, number, prompt, {"instruction", "input", "output", "history", *judged}),
                completion,
                "output",
            )
        column = self.source.completion or "completion"
        return self.problem(row, number, read={column, *judged}), self._completion(row, column), column

    def preference(self, row: Row, number: int, *, repeated: RepeatedPrompts) -> Preference:
        parsed = parse_row(row, self.source, repeats=repeated.cut_in(row))
        problem = replace(self.problem(row, number, parsed.prompt, parsed.used), repeated=parsed.repeated)
        responses = parsed.responses
        if not isinstance(responses["chosen"], str) and problem.chat is False:
            raise DataError("`chat: false`, but the responses are chat messages", where=row.where)
        others = {role: response for role, response in responses.items() if role not in ("chosen", "rejected")}
        return Preference(problem, responses["chosen"], responses["rejected"], others, parsed.scores)

    def unpaired(self, row: Row, number: int, *, repeated: RepeatedPrompts) -> Unpaired:
        label = self.source.label or "label"
        problem, completion, _ = self._example(row, number, label)
        problem, completion = self._behind_prompt(row, problem, completion, repeated)
        return Unpaired(problem, completion, label_of(columns.value(row, label), columns.at(row, label)))

    def stepwise(self, row: Row, number: int) -> Stepwise:
        column, label = self.source.steps or "completions", self.source.label or "labels"
        problem = self.problem(row, number, read={column, label})
        return Stepwise(problem, *labelled_steps(row, column, label))

    def _completion(self, row: Row, column: str) -> str | tuple[Message, ...]:
        found = whole_response(row, column)
        if self.template is None and not isinstance(found, str):
            found = columns.behind_prompt(columns.prompt(row, self.source.prompt), found)
        return found if isinstance(found, str) else columns.check_completion_messages(found, columns.at(row, column))

    def _behind_prompt(
        self, row: Row, problem: Problem, completion: str | tuple[Message, ...], repeated: RepeatedPrompts
    ) -> tuple[Problem, str | tuple[Message, ...]]:
        if isinstance(completion, str) and repeated.cut_in(row):
            return replace(problem, repeated=True), completion.removeprefix(row.values[self.source.prompt])
        return problem, completion

    def _prompt(self, row: Row) -> str | tuple[Message, ...]:
        source, where = self.source, columns.at(row, self.source.prompt)
        # A template may do without the prompt column, unless the recipe names one.
        prompt = None
        if self.template is None or "prompt" in source.model_fields_set:
            prompt = columns.prompt(row, source.prompt)
        if isinstance(prompt, tuple):
            for key, bad in (("chat: false", source.chat is False), ("template", self.template is not None)):
                if bad:
                    raise DataError(f"`{key}` cannot be used: the prompt is chat messages", where=where)
        elif self.template is not None:
            prompt = columns.text(self.template(row), f"{row.where}, template")
        return prompt

    def _said_by_system(self, row: Row, prompt: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
        """The prompt with what the row's `system` column says, unless the recipe says how a prompt is made."""
        source = self.source
        if source.chat is False or source.system is not None or self.template is not None:
            return prompt
        turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        whole = with_system(row, turns)
        return prompt if whole is turns else whole

    def _with_system(self, prompt: str | tuple[Message, ...], where: str) -> str | tuple[Message, ...]:
        source = self.source
        if source.system is None:
            return prompt
        if source.chat is False:
            raise RecipeError("`system` makes the prompt a chat, `chat: false` forbids it", where=f"{self.name}.system")
        messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        if messages[0]["role"] in ("system", "developer"):
            raise DataError(
                "the row has a system message of its own", where=where, hint="leave `system` out of the recipe"
            )
        return ({"role": "system", "content": source.system}, *messages)

    def _reference(self, row: Row, column: str) -> str:
        reference = columns.reference(row, column)
        if self.pattern is None:
            return reference
        where = f"{self.name}.reference_pattern"
        found = [match[1] for match in find(self.pattern.pattern, reference, where=where) if match[1] is not None]
        if not found or not found[-1].strip():
            raise DataError(
                f"reference_pattern {self.pattern.pattern!r} finds no answer in {_shorten(reference)!r}",
                where=columns.at(row, column),
            )
        return found[-1].strip()


def _last_only(completion: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    """The completion with its earlier assistant turns as context."""
    if isinstance(completion, str):
        return completion
    return (*(as_context(turn) if turn["role"] == "assistant" else turn for turn in completion[:-1]), completion[-1])


def _shorten(text: str, length: int = 80) -> str:
    return text if len(text) <= length else "..." + text[-length:]


def _compile_pattern(source: FileSource, name: str) -> re.Pattern[str] | None:
    if source.reference_pattern is None:
        return None
    where = f"{name}.reference_pattern"
    if source.reference is None:
        raise RecipeError(
            "`reference_pattern` has no effect without `reference`", where=where, hint="name the reference column"
        )
    try:
        pattern = compiled(source.reference_pattern)
    except ValueError as error:
        raise RecipeError(str(error), where=where) from error
    if not pattern.groups:
        raise RecipeError(
            "the pattern has no group", where=where, hint="put parentheses around the answer: '#### (.+)'"
        )
    return pattern


def _compile_template(template: str, prompt_column: str, name: str) -> Callable[[Row], str]:
    """The template as a function of a row; refuses stray braces now and unknown columns at the first row."""
    where = f"{name}.template"
    parts: list[tuple[str, bool]] = []
    end = 0
    for match in _PLACEHOLDER.finditer(template):
        parts.append((template[end : match.start()], False))
        end = match.end()
        if match[1] is not None:
            parts.append((match[1], True))
        elif match[0] in ("{{", "}}"):
            parts.append((match[0][0], False))
        else:
            raise RecipeError(f"single {match[0]!r} at character {match.start()}", where=where, hint="write {{ or }}")
    parts.append((template[end:], False))
    if not any(is_column for _, is_column in parts):
        raise RecipeError("the template names no column, so all prompts would be equal", where=where)

    def fill(row: Row) -> str:
        return "".join(_filled(row, part, prompt_column, where) if column else part for part, column in parts)

    return fill


def _filled(row: Row, column: str, prompt_column: str, where: str) -> str:
    if column not in row.values:
        if column != "prompt" or prompt_column not in row.values:
            present = ", ".join(row.values)
            raise DataError(
                f"the template ({where}) names {column!r}; columns: {present}",
                where=row.where,
                hint=nearest(column, map(str, row.values)),
            )
        column = prompt_column
    value = columns.value(row, column)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return columns.reference(row, column)
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    raise DataError(f"a template takes text and numbers, not {type(value).__name__}", where=columns.at(row, column))
