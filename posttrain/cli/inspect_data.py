"""`posttrain inspect DATA`: what a data set holds, before anything is trained on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.cli.tables import print_table
from posttrain.config.loading import load_recipe
from posttrain.config.mixtures import parts
from posttrain.config.relative_paths import nearest_local
from posttrain.config.schema import FileSource, ModelConfig, Source
from posttrain.data.bad_rows import BadRows
from posttrain.data.formats import KINDS
from posttrain.data.rendering import Renderer
from posttrain.data.sources import READERS, first_row, read_kind
from posttrain.errors import RecipeError, nearest
from posttrain.evaluation.inspect_data import PERCENTILES, DataFigures, figures, histogram, prompt_text
from posttrain.methods import CONFIGS
from posttrain.models.tokenizer import load_tokenizer
from posttrain.safe_files import write_json_atomic
from posttrain.terminal import say


@dataclass(frozen=True, slots=True)
class Options:
    """What `posttrain inspect` of data is asked for.

    Attributes:
        model: whose tokenizer and chat template count the tokens.
        kind: the section of `data` that the rows belong to; None finds it by their columns.
        chosen: `split` and `name` of folders and Hub data sets, where they are given.
        near: look for near duplicates.
        against: benchmarks, or files with prompts, that the rows should not overlap with.
        words: of a run that counts as overlap.
        max_length: tokens; None is no limit.
        max_prompt_length: tokens.
        output: JSON file.
        plot: PNG file.
    """

    model: str | None
    kind: str | None
    chosen: dict[str, str]
    near: bool
    against: list[str]
    words: int
    max_length: int | None
    max_prompt_length: int | None
    output: Path | None
    plot: Path | None


def inspect_data(targets: list[str], options: Options, *, as_json: bool) -> None:
    """Print the figures of files, folders, Hub data sets, or of all sources of a recipe.

    Raises:
        PosttrainError: data or tokenizer that cannot be read, or an option with a wrong value.
    """
    if options.kind is not None and options.kind not in READERS:
        raise RecipeError(f"no kind {options.kind!r}", where="--kind", hint=nearest(options.kind, READERS))
    limits = {"max_prompt_length": options.max_prompt_length, "max_length": options.max_length}
    found: list[tuple[str, str, Source]] = []
    model = None if options.model is None else ModelConfig(path=options.model)
    for target in targets:
        if target.endswith((".yaml", ".yml")):
            for key in options.chosen:
                raise RecipeError(f"--{key} has no effect on a recipe", where=target, hint="set it in its sources")
            recipe = load_recipe(target, [], CONFIGS, run_plugins=False)
            model = model or (recipe.model if recipe.model.path is not None else None)
            for key in limits:
                limits[key] = limits[key] or getattr(recipe.data, key)
            found += [part for section in KINDS for part in _of(recipe.data, section)]
        else:
            file = FileSource(path=target, **options.chosen)
            found.append((target, options.kind or read_kind(file, first_row(file, target)), file))
    renderer = None if model is None else Renderer(load_tokenizer(model))
    tests = {name: list(_prompts(name)) for name in options.against}
    results = []
    for name, kind, source in found:
        bad = BadRows()
        items = READERS[kind](source, name, bad=bad)
        further: dict[str, Any] = {"limits": limits, "near": options.near, "tests": tests, "n": options.words}
        results.append(figures(items, name, kind, bad, renderer=renderer, **further))
    _report(results, options, as_json=as_json)


def _of(data: Any, section: str) -> list[tuple[str, str, Source]]:
    value = getattr(data, section)
    return [] if value is None else [(name, section, source) for name, source in parts(value, section)]


def _prompts(name: str) -> list[str]:
    """The prompts of a benchmark or of a file.

    Raises:
        RecipeError: it is neither.
    """
    from posttrain.evaluation.benchmarks import BENCHMARKS, YAML, resolve

    path = Path(name).expanduser()
    if path.exists():
        file = FileSource(path=name)
        return [prompt_text(item) for item in READERS[read_kind(file, first_row(file, name))](file, name)]
    if name not in BENCHMARKS and not name.endswith(YAML):
        raise RecipeError(
            f"no such file, and no benchmark {name!r}",
            where="--against",
            hint=nearest_local(name) or nearest(name, BENCHMARKS),
        )
    return [prompt_text(item) for item in READERS["prompts"](resolve([name], {})[0].data, name)]


def _report(results: list[DataFigures], options: Options, *, as_json: bool) -> None:
    whole = [each.to_dict() for each in results]
    if options.output is not None:
        write_json_atomic(options.output, whole)
    if as_json:
        say(json.dumps(whole, indent=1, ensure_ascii=False))
    else:
        for each in results:
            _print(each)
    if options.plot is not None:
        from posttrain.tracking.plots import draw_lengths

        draw_lengths({each.name: each.lengths["whole"] for each in results}, results[0].unit, options.plot)
        say(f"{options.plot}: lengths of the rows")


def _print(found: DataFigures) -> None:
    print_table(_rows(found), f"{found.name}: {found.kind}")
    table = [(what, *(f"{value:,}" for value in values)) for what, values in found.percentiles().items()]
    names = tuple("longest" if p == 100 else "median" if p == 50 else f"{p}%" for p in PERCENTILES)
    print_table(table, f"length in {found.unit}", header=("of", *names))
    bars = [(span, f"{count:,}", bar) for span, count, bar in histogram(found.lengths["whole"])]
    print_table(bars, f"rows by length in {found.unit}", header=("length", "rows", ""))


def _rows(found: DataFigures) -> list[tuple[str, str, str]]:
    rows = [("rows", f"{found.rows:,}", "" if not found.read.dropped else found.read.summary())]
    if found.roles:
        roles = ", ".join(f"{count:,} {role}" for role, count in found.roles.items())
        note = f"; {found.context:,} of the assistant's without loss" if found.context else ""
        rows.append(("messages", f"{sum(found.roles.values()):,}", roles + note))
        turns = found.turns
        mean = sum(n * count for n, count in turns.items()) / sum(turns.values())
        rows.append(("messages per row", f"{mean:.1f}", f"{min(turns)} to {max(turns)}"))
    if found.tools:
        rows.append(("with tools", f"{found.tools:,}", "rows that offer the assistant functions"))
    rows.append(("repeats", f"{found.exact:,}", f"rows like an earlier one; {found.same_prompt:,} with its prompt"))
    if found.near is not None:
        rows.append(("near repeats", f"{found.near:,}", "80% of the runs of five words are those of an earlier row"))
    for test, count in found.overlap.items():
        rows.append(("overlap", f"{count:,}", f"rows that share a run of words with {test}"))
    if found.longer_chosen is not None:
        note = "of the pairs the chosen response is the longer one; a policy may learn that alone"
        rows.append(("longer chosen", f"{found.longer_chosen:.1%}", note))
    if found.good is not None:
        rows.append(("good", f"{found.good:.1%}", "of the labels"))
    if found.scripts:
        rows.append(("letters", "", ", ".join(f"{share:.1%} {name}" for name, share in found.scripts.items())))
    for key, count in found.lost.items():
        rows.append((key, f"{count / max(found.rows, 1):.1%}", f"{count:,} rows are longer"))
    return rows
