"""From a row of a table to a problem, with a completion, a pair or steps.

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
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from posttrain.config.patterns import compiled, find
from posttrain.config.schema import FileSource
from posttrain.data import columns
from posttrain.data.formats import (
    COLUMNS,
    Format,
    conversation,
    instruction,
    label_of,
    labelled_steps,
    whole_response,
    with_system,
)
from posttrain.data.messages import are_tool_schemas, as_context, tool_schemas
from posttrain.data.preferences import parse_row
from posttrain.data.repeated_prompts import RepeatedPrompts
from posttrain.data.sample import Example, Message, Preference, Problem, Row, Stepwise, Unpaired
from posttrain.errors import DataError, RecipeError, nearest

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class RowBuilder:
    """Makes problems, and what else sections of `data` hold, of the rows of one source.

    Attributes:
        source, name: the section, and how its rows are called.
        template: makes the prompt of a row.
        pattern: finds the answer in the reference column.
        format: how rows with completions are read.
    """

    source: FileSource
    name: str
    template: Callable[[Row], str] | None
    pattern: re.Pattern[str] | None
    format: Format = Format.PROMPT_COMPLETION

    @classmethod
    def of(cls, source: FileSource, name: str, format: Format = Format.PROMPT_COMPLETION) -> RowBuilder:
        """The builder of a source.

        Raises:
            RecipeError: a template or pattern that cannot be used.
        """
        template = None if source.template is None else _compile_template(source.template, source.prompt, name)
        return cls(source, name, template, _compile_pattern(source, name), format)

    def problem(
        self, row: Row, number: int, prompt: str | tuple[Message, ...] | None = None, read: Collection[str] = ()
    ) -> Problem:
        """The row's problem; `prompt` is given where no column holds it, `read` are columns that are no meta."""
        source = self.source
        # A template makes the prompt of the columns, which then say more than the prompt does: a code verifier, say,
        # runs a completion after the column with the function's head.
        used = set(read) | (set() if source.completion is None else {source.completion})
        used |= set() if self.template is not None else {source.prompt}
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
        """The row's problem with its written completion."""
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
        """The row's problem with its responses."""
        parsed = parse_row(row, self.source, repeats=repeated.cut_in(row))
        problem = replace(self.problem(row, number, parsed.prompt, parsed.used), repeated=parsed.repeated)
        responses = parsed.responses
        if not isinstance(responses["chosen"], str) and problem.chat is False:
            raise DataError("`chat: false`, but the responses are chat messages", where=row.where)
        others = {role: response for role, response in responses.items() if role not in ("chosen", "rejected")}
        return Preference(problem, responses["chosen"], responses["rejected"], others, parsed.scores)

    def unpaired(self, row: Row, number: int, *, repeated: RepeatedPrompts) -> Unpaired:
        """The row's problem with one completion, good or bad."""
        label = self.source.label or "label"
        problem, completion, _ = self._example(row, number, label)
        problem, completion = self._behind_prompt(row, problem, completion, repeated)
        return Unpaired(problem, completion, label_of(columns.value(row, label), columns.at(row, label)))

    def stepwise(self, row: Row, number: int) -> Stepwise:
        """The row's problem with a solution in labelled steps."""
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
        prompt: str | tuple[Message, ...] = ""
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
