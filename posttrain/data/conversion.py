"""Rows of any form that sources have, written in one plain form: `posttrain prepare rows`.

What is written reads back as the same problems: text stays text, conversations become `messages` of OpenAI's form with
`role` and `content`, and context turns keep their weight of 0. Columns of other names and gold answers are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.files import extension, known_extensions
from posttrain.data.formats import Format
from posttrain.data.sample import Example, Message, Preference, Problem, Stepwise, Unpaired
from posttrain.data.written_forms import Item, Row, written
from posttrain.errors import DataError
from posttrain.safe_files import file_atomic, write_text_atomic


def plain_row(item: Item, form: str | None = None) -> Row:
    """One row in the columns that `data.formats` recognises by themselves.

    Args:
        form: that it is written in; default: the plainest one.

    Raises:
        RecipeError, DataError: as `written_forms.written`.
    """
    if isinstance(item, Problem):
        return _with_problem({"prompt": _plain(item.prompt)}, item)
    problem, prompt = item.problem, _plain(item.problem.prompt)
    if form is not None or isinstance(item, Example | Preference):
        row = written(item, form or _plainest(item))
        if isinstance(item, Preference):
            row |= {f"score_{role}": score for role, score in item.scores.items()}
        return _with_problem(row, problem)
    if isinstance(item, Unpaired):
        return _with_problem({"prompt": prompt, "completion": _plain(item.completion), "label": item.label}, problem)
    return _with_problem({"prompt": prompt, "completions": list(item.steps), "labels": list(item.labels)}, problem)


def _plainest(item: Any) -> Format:
    if isinstance(item, Preference):
        return Format.PREFERENCE
    prompt = item.problem.prompt
    # Assistant turns of a prompt are context, and those of a conversation are trained on.
    talk = not isinstance(prompt, str) and not any(turn["role"] == "assistant" for turn in prompt)
    return Format.MESSAGES if talk and not isinstance(item.completion, str) else Format.PROMPT_COMPLETION


def as_pairs(items: Sequence[Any]) -> list[Item]:
    """Labelled completions as pairs: every good one of a prompt with every bad one of the same."""
    groups: dict[str, tuple[list[Unpaired], list[Unpaired]]] = {}
    for item in items:
        groups.setdefault(json.dumps(item.problem.prompt, sort_keys=True), ([], []))[not item.label].append(item)
    return [
        Preference(good.problem, good.completion, bad.completion)
        for found_good, found_bad in groups.values()
        for good in found_good
        for bad in found_bad
    ]


def as_unpaired(items: Sequence[Any]) -> list[Item]:
    """Each pair as a good and a bad completion; each solution in steps as one, good where all steps are right."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, Stepwise):
            found.append(Unpaired(item.problem, "\n".join(item.steps), all(item.labels)))
        elif isinstance(item, Preference):
            found += [Unpaired(item.problem, item.chosen, True), Unpaired(item.problem, item.rejected, False)]
    return found


def as_completions(items: Sequence[Item]) -> list[Item]:
    """The preferred responses of pairs, the good ones of labelled completions, or solutions without a wrong step."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, Preference):
            found.append(Example(item.problem, item.chosen))
        elif isinstance(item, Unpaired) and item.label:
            found.append(Example(item.problem, item.completion))
        elif isinstance(item, Stepwise) and all(item.labels):
            found.append(Example(item.problem, "\n".join(item.steps)))
    return found


def as_prompts(items: Sequence[Any]) -> list[Item]:
    """The problems alone, each once."""
    problems = {json.dumps(item.problem.prompt, sort_keys=True): item.problem for item in reversed(items)}
    return list(reversed(problems.values()))


CONVERSIONS: dict[tuple[str, str], Callable[[Sequence[Item]], list[Item]]] = {
    ("unpaired", "preferences"): as_pairs,
    ("preferences", "unpaired"): as_unpaired,
    ("stepwise", "unpaired"): as_unpaired,
    ("stepwise", "preferences"): lambda items: as_pairs(as_unpaired(items)),
    ("preferences", "completions"): as_completions,
    ("unpaired", "completions"): as_completions,
    ("stepwise", "completions"): as_completions,
    ("completions", "prompts"): as_prompts,
    ("preferences", "prompts"): as_prompts,
    ("unpaired", "prompts"): as_prompts,
    ("stepwise", "prompts"): as_prompts,
}
"""From one section of `data` to another."""


def convert(items: Sequence[Item], kind: str, to: str) -> list[Item]:
    """The rows as rows of another section.

    Raises:
        DataError: that cannot be made of them, or nothing comes of it.
    """
    if kind == to:
        return list(items)
    if (kind, to) not in CONVERSIONS:
        possible = [target for source, target in CONVERSIONS if source == kind]
        raise DataError(
            f"rows of {kind} cannot become {to}", hint=f"they can become: {', '.join(possible) or 'nothing else'}"
        )
    found = CONVERSIONS[kind, to](items)
    if not found:
        raise DataError(f"none of the {len(items)} rows of {kind} gives a row of {to}")
    return found


def write_rows(items: Sequence[Item], out: Path, form: str | None = None) -> int:
    """Write the rows as JSON Lines or Parquet, and return how many they are.

    Args:
        form: as for `plain_row`.

    Raises:
        DataError: another kind of file, or it exists; or a row that the form has no place for.
        RecipeError: no such form of these rows.
    """
    kind = extension(out)
    if kind not in (".jsonl", ".parquet"):
        raise DataError(
            "rows are written as .jsonl or .parquet", where=str(out), hint=f"read are: {', '.join(known_extensions())}"
        )
    if out.exists():
        raise DataError("the file exists", where=str(out), hint="choose another, or remove it")
    rows = [plain_row(item, form) for item in items]
    if kind == ".jsonl":
        write_text_atomic(out, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        with file_atomic(out) as beside:
            parquet.write_table(pyarrow.Table.from_pylist([_typed(row) for row in rows]), beside)
    return len(rows)


def _with_problem(row: Row, problem: Problem) -> Row:
    further = dict(problem.meta)
    if problem.tools:
        further["tools"] = list(problem.tools)
    if problem.reference is not None:
        further.setdefault("reference", problem.reference)
    return row | {key: value for key, value in further.items() if key not in row}


def _typed(value: Any, key: str = "") -> Any:
    """The same with the arguments of tool calls as JSON text: a typed file would give all calls the same ones."""
    if isinstance(value, dict):
        return {
            name: json.dumps(item, ensure_ascii=False)
            if name == "arguments" and key == "tool_calls"
            else _typed(item, key if name == "function" else name)
            for name, item in value.items()
        }
    return [_typed(item, key) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: str | tuple[Message, ...]) -> Any:
    return value if isinstance(value, str) else [dict(message) for message in value]
