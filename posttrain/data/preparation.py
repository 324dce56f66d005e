"""From a recipe's sources to what a shell trains on: load, render, fit to the limits.

`train` and `check` share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from posttrain.config.needs import Needs
from posttrain.config.positions import model_positions
from posttrain.config.schema import Recipe
from posttrain.data.known_traces import KnownTrace, WrittenTrace, fit_traces, load_traces, trace_sample
from posttrain.data.preferences import usable
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Message, Preference, Problem, Sample
from posttrain.data.sources import examples, preferences, problems
from posttrain.data.truncation import Ledger, fit_groups, fit_prompts, fit_samples

Rows = list[Problem] | list[Example] | list[Preference] | list[WrittenTrace]
Fitted = list[tuple[Problem, list[int]]] | list[Sample]


def load_rows(recipe: Recipe, needs: Needs, *, offline: bool = False) -> Rows:
    """The rows of the data section that the method reads.

    Raises:
        DataError: a missing file, column or bad row.
    """
    if "prompts" in needs.data:
        return problems(recipe.data.prompts, "prompts", offline=offline)
    if "preferences" in needs.data:
        return preferences(recipe.data.preferences, "preferences", offline=offline)
    if needs.data == ("traces",):
        return load_traces(recipe.data.traces, "traces", offline=offline)
    if needs.traces_instead and recipe.data.completions is None:
        return load_traces(recipe.data.traces, "traces", offline=offline)
    return examples(recipe.data.completions, "completions", offline=offline)


def load_known(recipe: Recipe, needs: Needs, *, offline: bool = False) -> list[WrittenTrace]:
    """The traces that the method reads beside its rows; none if it reads none.

    Raises:
        DataError: a missing file or bad row, or no trace is left.
    """
    beside = "traces" in needs.data and needs.data != ("traces",)
    return load_traces(recipe.data.traces, "traces", offline=offline) if beside else []


def fit_known(recipe: Recipe, traces: list[WrittenTrace], renderer: Renderer) -> tuple[list[KnownTrace], Ledger]:
    """These traces as token ids within the recipe's limits and the positions of the model.

    Raises:
        DataError: as `fit_rows`.
    """
    data = recipe.data
    positions = model_positions(recipe.model)
    return fit_traces(
        traces,
        renderer,
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length or positions,
        policy=data.too_long,
        max_lost_share=data.max_lost_share,
    )


def corpus(rows: Rows, traces: Sequence[WrittenTrace] = ()) -> Iterator[str]:
    """All text of rows and traces, for a tokenizer that is learnt from them."""
    for row in (*rows, *traces):
        row = row.example if isinstance(row, WrittenTrace) else row
        for part in _texts(row):
            yield part if isinstance(part, str) else "\n".join(message["content"] for message in part)


def first_texts(rows: Rows, number: int = 4) -> list[str]:
    """Some text of the first rows."""
    return list(islice(corpus(rows[:number]), 2 * number))


def _texts(row: Problem | Example | Preference) -> tuple[str | tuple[Message, ...], ...]:
    if isinstance(row, Problem):
        return (row.prompt,)
    if isinstance(row, Example):
        return (row.problem.prompt, row.completion)
    return (row.problem.prompt, row.chosen, row.rejected, *row.others.values())


def fit_rows(recipe: Recipe, needs: Needs, rows: Rows, renderer: Renderer) -> tuple[Fitted, Ledger]:
    """Rows as token ids within the recipe's limits and the positions of the model.

    Raises:
        DataError: more rows are lost than `data.max_lost_share` allows, or an over-long row with `too_long: error`.
    """
    data = recipe.data
    positions = model_positions(recipe.model)
    rules = {"policy": data.too_long, "max_lost_share": data.max_lost_share, "head_ids": renderer.head_ids}
    if needs.rollouts:
        limit = data.max_prompt_length
        if limit is None and positions is not None:
            limit = positions - recipe.rollouts.max_new_tokens
        return fit_prompts([(problem, renderer.prompt_ids(problem)) for problem in rows], limit, **rules)
    samples = [trace_sample(row, renderer) if isinstance(row, WrittenTrace) else renderer.sample(row) for row in rows]
    return fit_samples(samples, data.max_prompt_length, data.max_length or positions, **rules)


def fit_preferences(
    recipe: Recipe,
    rows: Sequence[Preference],
    responses: Callable[[Preference], Mapping[str, Sample]],
    *,
    head_ids: Sequence[int] = (),
) -> tuple[list[dict[str, Sample]], Ledger]:
    """Preference rows as token ids, role by role; a row is used only if all its responses are.

    The ledger counts every row of `rows`, also those that say nothing (see `data.preferences.usable`). The problem ids
    of the samples tell which rows are left.

    Args:
        recipe: limits of its data section, and the positions of the model.
        rows: as `load_rows` gives them.
        responses: the token sequences that a row is made of, by role.
        head_ids: as in `data.truncation`: `Renderer.head_ids`.

    Raises:
        DataError: as `fit_rows`.
    """
    data = recipe.data
    positions = model_positions(recipe.model)
    kept, unusable = usable(rows)
    dropped = unusable.identical + unusable.empty
    return fit_groups(
        [responses(row) for row in kept],
        data.max_prompt_length,
        data.max_length or positions,
        data.too_long,
        data.max_lost_share,
        head_ids=head_ids,
        ledger=Ledger(dropped=dropped, identical=unusable.identical, empty=unusable.empty),
    )
