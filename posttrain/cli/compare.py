"""`posttrain compare`: methods over seeds, or single runs problem by problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.bounded_files import MAX_REPORT, read_json
from posttrain.config.comparison import CompareConfig
from posttrain.config.loading import parse_config
from posttrain.config.locations import Locations
from posttrain.config.yaml_file import read_file
from posttrain.errors import RecipeError
from posttrain.safe_files import refuse_links_out, write_json_atomic
from posttrain.terminal import console, say

if TYPE_CHECKING:
    from posttrain.evaluation.report import Report


_ONE_RUN_EACH = "one run each: this compares two models, not two methods; for methods give several seeds of each"


def compare_command(runs: list[str], options: dict[str, Any], output: Path | None, plot: Path | None) -> None:
    """Compare what was given.

    Args:
        runs: `name=folder,folder,...` per method; or one YAML file with the keys of `CompareConfig`; or reports and run
            folders, which are compared with the first of them problem by problem, and row by row on held-out pairs.
        options: keys of `CompareConfig` from the command line; they win over the file.
        output: JSON file of a comparison over seeds; an earlier one there must be of the same plan.
        plot: PNG file of a comparison over seeds.

    Raises:
        RecipeError: arguments of several kinds, or options without effect.
        DataError: as `seeds.compare_seeds`, `compare.compare_reports` and `compare_pairs.compare_pairs`.
    """
    methods = [run for run in runs if "=" in run]
    if len(runs) == 1 and runs[0].endswith((".yaml", ".yml")):
        data, locations = read_file(runs[0])
        _over_seeds(data | options, locations, output, plot)
    elif methods and len(methods) == len(runs):
        _over_seeds({"methods": _methods(runs)} | options, Locations("command line"), output, plot)
    elif methods:
        raise RecipeError("methods (name=folder,...) and single runs cannot be mixed", where=", ".join(runs))
    else:
        given = [*options, *(["output"] if output else []), *(["plot"] if plot else [])]
        if given:
            hint = "for methods over seeds write name=folder,folder,... for each method"
            raise RecipeError(f"`{given[0]}` has no effect on single runs", hint=hint)
        _problem_by_problem(runs)


def _methods(runs: list[str]) -> dict[str, list[str]]:
    methods: dict[str, list[str]] = {}
    for run in runs:
        name, _, folders = run.partition("=")
        if name in methods:
            raise RecipeError(f"method {name!r} is given twice", where=run, hint="put all of its folders behind one =")
        methods[name] = [folder for folder in folders.split(",") if folder]
    return methods


def _over_seeds(data: dict[str, Any], locations: Locations, output: Path | None, plot: Path | None) -> None:
    from posttrain.evaluation.seeds import check_continued, compare_seeds, draw, print_seed_comparison

    comparison = compare_seeds(parse_config(data, CompareConfig, (), locations))
    if output is not None and output.exists():
        check_continued(read_json(output, most=MAX_REPORT), comparison, where=str(output))
    print_seed_comparison(comparison, console())
    if output is not None:
        write_json_atomic(output, comparison.to_dict())
        say(f"comparison: {output}")
    if plot is not None:
        say(f"plot: {draw(comparison, plot)}")


def _labelled(report: Report, run: str) -> Report:
    """Reports of a run are labelled by their step alone."""
    return replace(report, model_label=f"{run}: {report.model_label}") if Path(run).is_dir() else report


def _measured(runs: list[str]) -> list[str]:
    """Reports, and folders of finished runs; what `runs/*` names beside them is left out with a word."""
    kept = []
    for run in runs:
        folder = Path(run)
        refuse_links_out(folder)
        if folder.is_dir() and not (folder / "model").exists():
            say(f"{run}: holds no finished run, left out")
        elif folder.is_dir() and not any((folder / name).is_dir() for name in ("evaluation", "held_out")):
            say(f"{run}: the run has no evaluations, left out")
        else:
            kept.append(run)
    return kept


def _problem_by_problem(runs: list[str]) -> None:
    from posttrain.evaluation.compare import compare_reports, print_comparison
    from posttrain.evaluation.compare_pairs import compare_pairs, last_pairs, print_pairs
    from posttrain.evaluation.report import Report
    from posttrain.evaluation.runs import last_report

    if len(runs := _measured(runs)) < 2:
        raise RecipeError(
            "one run cannot be compared" if runs else "there is no finished run to compare",
            where=", ".join(runs),
            hint="give two that are finished, or methods name=folder,...",
        )
    shown = console()
    held_out = [last_pairs(Path(run)) for run in runs]
    if None not in held_out:
        for run, pairs in zip(runs[1:], held_out[1:], strict=True):
            print_pairs(runs[0], run, compare_pairs(held_out[0], pairs), shown)
        if not any((Path(run) / "evaluation").is_dir() for run in runs):
            shown.print(_ONE_RUN_EACH)
            return
        shown.rule()
    base, *others = (_labelled(Report.load(last_report(Path(run))), run) for run in runs)
    for number, other in enumerate(others):
        if number:
            shown.rule()
        print_comparison(compare_reports(base, other), shown)
    shown.print(_ONE_RUN_EACH)
