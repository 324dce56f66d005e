"""`posttrain prepare`: traces to pairs and other rows, and texts of others to traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.cli.tables import print_table
from posttrain.config.collection import (
    CompletionSettings,
    PairSettings,
    PrefixSettings,
    ResponseSettings,
    StepLabelConfig,
    TakeInConfig,
    TakeInEpisodesConfig,
)
from posttrain.config.loading import load_config, parse_config
from posttrain.data.pairs import PairReport, write_pairs
from posttrain.data.trace_rows import response_roles, write_completions, write_responses
from posttrain.terminal import say


def pairs_command(paths: list[Path], out: Path, options: dict[str, Any], own: Path | None) -> None:
    """Make pairs, print the report and how a recipe reads them.

    Raises:
        RecipeError: an option with a wrong value.
        DataError: as `data.pairs.write_pairs`.
    """
    settings = parse_config(options, PairSettings)
    report = write_pairs(paths, out, settings, own)
    print_table(_counts(report), f"pairs: {settings.strategy}")
    say(f"\n{out}: {report.pairs:,} pairs; {out.with_suffix('.report.json')}: the report")
    gold = ", others: {gold: gold}" if settings.strategy == "second_best" else ""
    say(f"in a recipe: data: {{preferences: {{path: {out}{gold}}}}}")


def responses_command(paths: list[Path], out: Path, options: dict[str, Any]) -> None:
    """Make rows of n scored responses, print the report and how a recipe reads them.

    Raises:
        RecipeError: an option with a wrong value.
        DataError: as `data.trace_rows.write_responses`.
    """
    settings = parse_config(options, ResponseSettings)
    report = write_responses(paths, out, settings)
    left = f"left out: {report.unscored:,} without a score, {report.unfinished:,} cut at the token limit, "
    left += f"{report.empty:,} empty, {report.repeated:,} repeats"
    none = f"{report.prompts_few:,} prompts with fewer different texts, {report.prompts_tied:,} with equal scores"
    rows = [("traces", f"{report.traces:,}", left)]
    rows.append(("rows", f"{report.rows:,}", f"of {report.prompts:,}; none: {none}"))
    print_table(rows, f"rows of {settings.n} responses: {settings.choose}")
    say(f"\n{out}: {report.rows:,} rows; {out.with_suffix('.report.json')}: the report")
    others = ", ".join(f"{role}: {role}" for role in response_roles(settings.n)[2:])
    others = f", others: {{{others}}}" if others else ""
    say(f"in a recipe: data: {{preferences: {{path: {out}{others}}}}}")


def completions_command(paths: list[Path], out: Path, options: dict[str, Any]) -> None:
    """Make rows of correct completions, print the report and how a recipe reads them.

    Raises:
        RecipeError: an option with a wrong value.
        DataError: as `data.trace_rows.write_completions`.
    """
    report = write_completions(paths, out, parse_config(options, CompletionSettings))
    left = f"left out: {report.incorrect:,} incorrect, {report.unverified:,} without a verdict, "
    left += f"{report.unfinished:,} cut at the token limit, {report.empty:,} empty, {report.repeated:,} repeats"
    used = f"of {report.prompts_used:,} of {report.prompts:,} problems; {report.over_limit:,} more above per_problem"
    print_table([("traces", f"{report.traces:,}", left), ("rows", f"{report.rows:,}", used)], "correct completions")
    say(f"\n{out}: {report.rows:,} rows; {out.with_suffix('.report.json')}: the report")
    say(f"in a recipe: data: {{completions: {{path: {out}, completion: completion}}}}")


def prefixes_command(paths: list[Path], out: Path, options: dict[str, Any], model: str) -> None:
    """Cut traces, print the report and how a recipe uses them.

    Raises:
        RecipeError: an option with a wrong value.
        DataError: as `data.prefix_file.write_prefixes`.
        ModelError: the tokenizer cannot be loaded.
    """
    settings = parse_config(options, PrefixSettings)

    from posttrain.config.schema import ModelConfig
    from posttrain.data.prefix_file import write_prefixes
    from posttrain.data.rendering import Renderer
    from posttrain.models.tokenizer import load_tokenizer

    renderer = Renderer(load_tokenizer(ModelConfig(path=model)))
    report = write_prefixes(paths, out, settings, renderer)
    rows = [("problems solved", f"{report.solved:,}", f"of {report.problems:,}; {report.cut:,} of them have a prefix")]
    note = f"{report.own_ids:,} with the ids that were sampled; in {report.unguarded:,} the answer was not found"
    rows.append(("correct traces", f"{report.traces:,}", note))
    note = f"{report.guarded:,} end early so as not to show the answer; {report.missing:,} not made (repeats, no place)"
    rows.append(("prefixes", f"{report.prefixes:,}", note))
    shares = "{min:.2f} to {max:.2f}".format(**report.fraction)
    rows.append(("share of the trace", f"{report.fraction['mean']:.2f}", shares))
    rows.append(("tokens", f"{report.tokens['mean']:.1f}", "{min:g} to {max:g}".format(**report.tokens)))
    print_table(rows, "prefixes")
    say(f"\n{out}: {report.prefixes:,} prefixes; {out.with_suffix('.report.json')}: the report")
    written = f"[{', '.join(map(str, paths))}]" if len(paths) > 1 else str(paths[0])
    say(f"in a recipe, where `prefixrl` cuts them itself: data: {{traces: {{path: {written}}}}}")


def steps_command(path: Path, overrides: list[str]) -> None:
    """Label the steps of traces by completions from behind each, and say what came out.

    Raises:
        RecipeError: a wrong key.
        PosttrainError: as `rollouts.step_labels.write_step_labels`.
    """
    config = load_config(path, StepLabelConfig, overrides)

    import torch

    from posttrain.rollouts.step_labels import write_step_labels

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    report = write_step_labels(config, say)
    left = f"of {report.traces:,} traces; {report.unfinished:,} unfinished and {report.unjudged:,} not judged left out"
    rows = [("rows", f"{report.rows:,}", left)]
    rows.append(("steps", f"{report.steps:,}", f"{report.right / report.steps:.1%} labelled right"))
    rows.append(("share", f"{report.mean_share:.1%}", "of right completions behind a step, on the average"))
    rows.append(("completions", f"{report.sampled:,}", f"{report.unknown:,} not judged"))
    print_table(rows, "labels of steps")
    say(f"\n{config.output}: {report.rows:,} rows")
    say(f"in a recipe: data: {{stepwise: {{path: {config.output}}}}}, method: {{name: prm}}")


def rows_command(path: str, out: Path, keys: list[str], kind: str | None, to: str | None, form: str | None) -> None:
    """Read rows of any form and write them in the plain one, as they are or as rows of another kind.

    Args:
        path: file, folder or Hub id.
        keys: `key=value` of a source, such as `prompt=question`.
        kind: the section of `data` that the rows belong to; None finds it by their columns.
        to: the section that they are to become rows of; None leaves them.
        form: that they are written in (`data.written_forms`); None takes the plainest.

    Raises:
        RecipeError: an option with a wrong value.
        DataError: rows that cannot be read, or cannot become what is asked for.
    """
    from posttrain.config.schema import FileSource
    from posttrain.data.bad_rows import BadRows
    from posttrain.data.conversion import convert, write_rows
    from posttrain.data.sources import READERS, first_row, read_kind
    from posttrain.data.traces import manifest_path
    from posttrain.errors import DataError, RecipeError, nearest

    if kind is None and manifest_path(Path(path)).is_file():
        raise DataError(
            "these are traces, with their manifest beside them",
            where=path,
            hint="`posttrain prepare completions`, `pairs` and `responses` make rows of them",
        )
    source = parse_config({"path": path}, FileSource, keys)
    for option, value in (("--kind", kind), ("--to", to)):
        if value is not None and value not in READERS:
            raise RecipeError(f"no kind {value!r}", where=option, hint=nearest(value, READERS))
    kind = kind or read_kind(source, first_row(source, path))
    bad = BadRows()
    items = READERS[kind](source, path, bad=bad)
    written = write_rows(convert(items, kind, to or kind), out, form)
    left = bad.ledger(path)
    say(f"{path}: {len(items):,} rows of {kind}" + (f"; left out: {left.summary()}" if left.dropped else ""))
    if to == "completions" and kind in ("unpaired", "stepwise"):
        say(f"left out: {len(items) - written:,} rows labelled bad")
    if kind == "preferences" and to is not None and to != kind:
        others = sorted({role for item in items for role in item.others})
        if others:
            say(f"left aside: the responses {', '.join(others)}")
    say(f"{out}: {written:,} rows")
    say(f"in a recipe: data: {{{to or kind}: {{path: {out}}}}}")


def take_in_command(config: Path, overrides: list[str]) -> None:
    """Take in texts of others as traces."""
    settings = load_config(config, TakeInConfig, overrides)

    from posttrain.rollouts.take_in import take_in

    done = take_in(settings)
    say(f"{done.path}: {done.summary()}")


def episodes_command(config: Path, overrides: list[str]) -> None:
    """Take in conversations as episodes."""
    settings = load_config(config, TakeInEpisodesConfig, overrides)

    from posttrain.rollouts.take_in_episodes import take_in_episodes

    episodes = take_in_episodes(settings)
    problems = len({episode.problem.id for episode in episodes})
    turns = sum(len(episode.turns) for episode in episodes)
    solved = sum(episode.status.value == "correct" for episode in episodes)
    say(f"{settings.output}: {len(episodes):,} episodes of {problems:,} problems, {turns:,} turns, {solved:,} solved")
    say(f"in a recipe: data: {{traces: {{path: {settings.output}}}}}")


def _counts(report: PairReport) -> list[tuple[str, str, str]]:
    out = f"left out: {report.unscored:,} without a score, {report.unfinished:,} cut at the token limit, "
    out += f"{report.empty:,} empty, {report.repeated:,} repeats"
    rows = [("traces", f"{report.traces:,}", out)]
    rows.append(("prompts used", f"{report.prompts_used:,}", f"of {report.prompts:,}; no pair: {report.unpaired()}"))
    rows.append(("pairs", f"{report.pairs:,}", f"{report.over_limit:,} more left out by max_pairs"))
    if report.margin is not None:
        rows.append(("margin", f"{report.margin['mean']:.3f}", "mean; {min:g} to {max:g}".format(**report.margin)))
        difference = report.chosen_length - report.rejected_length
        note = f"{report.length_unit}, chosen - rejected ({report.chosen_length:.1f} - {report.rejected_length:.1f}); "
        rows.append(("length", f"{difference:+.1f}", note + f"the chosen one is longer in {report.longer_chosen:.1%}"))
    for policy, (chosen, rejected) in report.by_policy.items():
        rows.append(("written by", policy, f"{chosen:.1%} of the chosen, {rejected:.1%} of the rejected"))
    if report.own is not None:
        rows.append(("own samples", "", f"{report.own[0]:.1%} of the chosen, {report.own[1]:.1%} of the rejected"))
    return rows
