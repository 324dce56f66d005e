"""`posttrain prepare`: traces to pairs, and texts of others to traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from posttrain.cli.tables import print_table
from posttrain.config.collection import PairSettings, TakeInConfig
from posttrain.config.loading import load_config, parse_config
from posttrain.data.pairs import PairReport, write_pairs


def pairs_command(paths: list[Path], out: Path, options: dict[str, Any], own: Path | None) -> None:
    """Make pairs, print the report and how a recipe reads them.

    Raises:
        RecipeError: an option with a wrong value.
        DataError: as `data.pairs.write_pairs`.
    """
    settings = parse_config(options, PairSettings)
    report = write_pairs(paths, out, settings, own)
    print_table(_counts(report), f"pairs: {settings.strategy}")
    typer.echo(f"\n{out}: {report.pairs:,} pairs; {out.with_suffix('.report.json')}: the report")
    gold = ", others: {gold: gold}" if settings.strategy == "second_best" else ""
    typer.echo(f"in a recipe: data: {{preferences: {{path: {out}{gold}}}}}")


def take_in_command(config: Path, overrides: list[str]) -> None:
    """Take in texts of others as traces."""
    settings = load_config(config, TakeInConfig, overrides)

    from posttrain.rollouts.take_in import take_in

    done = take_in(settings)
    typer.echo(f"{done.path}: {done.summary()}")


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
