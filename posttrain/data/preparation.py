"""From a recipe's sources to what a shell trains on: load, render, fit to the limits.

`train` and `check` share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from posttrain.config.mixtures import parts, source_of
from posttrain.config.needs import Needs
from posttrain.config.positions import model_positions
from posttrain.config.schema import Recipe
from posttrain.data.bad_rows import BadRows
from posttrain.data.few_prompts import few_prompts
from posttrain.data.known_traces import KnownTrace, WrittenTrace, fit_traces, load_trace_sources, trace_sample
from posttrain.data.preferences import usable
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Message, Preference, Problem, Sample, Stepwise, Unpaired
from posttrain.data.sources import READERS
from posttrain.data.streaming import LEARNT_FROM, StreamedRows, StreamedSamples, wants_streaming
from posttrain.data.truncation import Ledger, fit_groups, fit_prompts, fit_sequences

Rows = (
    list[Problem]
    | list[Example]
    | list[Preference]
    | list[Unpaired]
    | list[Stepwise]
    | list[WrittenTrace]
    | StreamedRows
)
Fitted = list[tuple[Problem, list[int]]] | list[Sample] | StreamedSamples


def load_rows(recipe: Recipe, needs: Needs, *, offline: bool = False, bad: BadRows | None = None) -> Rows:
    """The rows of the data section that the method reads, source after source; with `data.streaming` on the disk yet.

    Args:
        bad: takes the rows that cannot be used; None stops at the first one.

    Raises:
        DataError: a missing file, column or bad row.
    """
    section = section_of(recipe, needs)
    if section == "traces":
        return load_trace_sources(recipe.data.traces, offline=offline, bad=bad)
    read = READERS[section]
    sources = parts(getattr(recipe.data, section), section)
    if section == "completions" and wants_streaming(recipe, section):
        return StreamedRows(sources, offline=offline)
    return [row for name, source in sources for row in read(source, name, offline=offline, bad=bad)]


def section_of(recipe: Recipe, needs: Needs) -> str:
    """The key of the data section that holds the rows that the method trains on."""
    if needs.traces_instead and recipe.data.completions is None:
        return "traces"
    return next((name for name in ("prompts", "preferences") if name in needs.data), needs.data[0])


def load_known(
    recipe: Recipe, needs: Needs, *, offline: bool = False, bad: BadRows | None = None
) -> list[WrittenTrace]:
    """The traces that the method reads beside its rows; none if it reads none.

    Raises:
        DataError: a missing file or bad row, or no trace is left.
    """
    beside = "traces" in needs.data and needs.data != ("traces",)
    return load_trace_sources(recipe.data.traces, offline=offline, bad=bad) if beside else []


def fit_known(
    recipe: Recipe, traces: list[WrittenTrace], renderer: Renderer, bad: BadRows | None = None
) -> tuple[list[KnownTrace], Ledger]:
    """These traces as token ids within the recipe's limits and the positions of the model.

    Raises:
        DataError: as `fit_rows`.
    """
    data = recipe.data
    positions = model_positions(recipe.model)
    rules: dict[str, Any] = {
        "max_prompt_length": data.max_prompt_length,
        "max_length": data.max_length or positions,
        "policy": data.too_long,
        "max_lost_share": data.max_lost_share,
        "bad": bad,
    }
    return _by_source(recipe, "traces", traces, lambda group, name: fit_traces(group, renderer, name=name, **rules))


def corpus(rows: Rows, traces: Sequence[WrittenTrace] = ()) -> Iterator[str]:
    """The text of rows and traces, for a tokenizer that is learnt from them; of rows on the disk that of the first."""
    for row in (*(rows[:LEARNT_FROM] if isinstance(rows, StreamedRows) else rows), *traces):
        row = row.example if isinstance(row, WrittenTrace) else row
        for part in _texts(row):
            yield part if isinstance(part, str) else "\n".join(message["content"] for message in part)


def first_texts(rows: Rows, number: int = 4) -> list[str]:
    """Some text of the first rows."""
    return list(islice(corpus(rows[:number]), 2 * number))


def _texts(row: Problem | Example | Preference | Unpaired | Stepwise) -> tuple[str | tuple[Message, ...], ...]:
    if isinstance(row, Problem):
        return (row.prompt,)
    if isinstance(row, Example | Unpaired):
        return (row.problem.prompt, row.completion)
    if isinstance(row, Stepwise):
        return (row.problem.prompt, *row.steps)
    return (row.problem.prompt, row.chosen, row.rejected, *row.others.values())


def fit_rows(
    recipe: Recipe, needs: Needs, rows: Rows, renderer: Renderer, bad: BadRows | None = None
) -> tuple[Fitted, Ledger]:
    """Rows as token ids within the recipe's limits and the positions of the model.

    Args:
        bad: takes the rows that cannot be rendered, and holds those that could not be read; None stops at the first.

    Raises:
        DataError: more rows of a source are lost than `data.max_lost_share` allows, or an over-long row with
            `too_long: error`.
    """
    data = recipe.data
    bad = bad or BadRows("error")
    positions = model_positions(recipe.model)
    if isinstance(rows, StreamedRows):
        streamed = StreamedSamples(rows, renderer, data, data.max_length or positions, recipe.seed)
        return streamed, streamed.probe_ledger
    rules: dict[str, Any] = {
        "policy": data.too_long,
        "max_lost_share": data.max_lost_share,
        "head_ids": renderer.head_ids,
    }
    limit = data.max_prompt_length
    if needs.rollouts and limit is None and positions is not None:
        longest = positions if recipe.environment is None else recipe.environment.episode_tokens
        limit = longest - recipe.rollouts.max_new_tokens

    # Episodes and traces are about the ids of prompts.
    few = renderer.counts_few and recipe.environment is None and data.traces is None

    def fit(group: Sequence, name: str) -> tuple[list, Ledger]:
        if needs.rollouts:
            if few:
                prompts = few_prompts(group, renderer, limit, bad, name)
            else:
                prompts = bad.made(group, lambda problem: (problem, renderer.prompt_ids(problem)), name)
            return fit_prompts(prompts, limit, **rules, ledger=bad.ledger(name))
        made = bad.made(group, lambda row: _samples(row, renderer), name)
        room = data.max_length or positions
        return fit_sequences(made, data.max_prompt_length, room, **rules, ledger=bad.ledger(name))

    return _by_source(recipe, section_of(recipe, needs), rows, fit)


def _samples(row: Example | WrittenTrace, renderer: Renderer) -> list[Sample]:
    return [trace_sample(row, renderer)] if isinstance(row, WrittenTrace) else renderer.samples(row)


def _by_source(
    recipe: Recipe, section: str, rows: Sequence, fit: Callable[[Sequence, str], tuple[list, Ledger]]
) -> tuple[list, Ledger]:
    """The rows of each source fitted by themselves, so that no source is lost among larger ones."""
    sources = parts(getattr(recipe.data, section), section)
    if len(sources) == 1:
        return fit(rows, section)
    grouped: dict[str, list] = {name: [] for name, _ in sources}
    for row in rows:
        problem = row if isinstance(row, Problem) else row.problem
        grouped[row.source if isinstance(row, WrittenTrace) else source_of(problem.id)].append(row)
    fitted: list = []
    whole = Ledger()
    for name, group in grouped.items():
        found, ledger = fit(group, name)
        fitted += found
        whole.add(name, ledger)
    return fitted, whole


def fit_preferences(
    recipe: Recipe,
    rows: Sequence[Preference | Unpaired | Stepwise],
    responses: Callable[[Preference | Unpaired | Stepwise], Mapping[str, Sample]],
    *,
    head_ids: Sequence[int] = (),
    bad: BadRows | None = None,
    section: str | None = "preferences",
) -> tuple[list[dict[str, Sample]], Ledger]:
    """Rows of responses as token ids, role by role; a row is used only if all its responses are.

    The ledger counts every row of `rows`, also those that say nothing (see `data.preferences.usable`). The problem ids
    of the samples tell which rows are left.

    Args:
        recipe: limits of its data section, and the positions of the model.
        rows: as `load_rows` gives them.
        responses: the token sequences that a row is made of, by role.
        head_ids: as in `data.truncation`: `Renderer.head_ids`.
        bad: as in `fit_rows`.
        section: that the rows are of; None for rows of another place, which are taken together.

    Raises:
        DataError: as `fit_rows`.
    """
    data = recipe.data
    bad = bad or BadRows("error")
    positions = model_positions(recipe.model)

    def fit(group: Sequence[Any], name: str) -> tuple[list[dict[str, Sample]], Ledger]:
        kept, unusable = usable(group)
        made = bad.made(kept, responses, name)
        ledger = bad.ledger(name)
        ledger.identical, ledger.empty = unusable.identical, unusable.empty
        ledger.dropped += unusable.identical + unusable.empty
        room = data.max_length or positions
        rules: dict[str, Any] = {"head_ids": head_ids, "ledger": ledger}
        return fit_groups(made, data.max_prompt_length, room, data.too_long, data.max_lost_share, **rules)

    return fit(rows, "pairs") if section is None else _by_source(recipe, section, rows, fit)
