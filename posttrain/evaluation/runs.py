"""Scores and compute of finished runs, read from their folders. Reads without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from posttrain.config.comparison import CompareConfig
from posttrain.errors import DataError, nearest
from posttrain.evaluation.compare import check_same
from posttrain.evaluation.report import Report
from posttrain.safe_files import refuse_links_out
from posttrain.tracking.events import FILE_NAME, read_events, series
from posttrain.tracking.ledger import AMOUNTS

_STEP = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True, slots=True)
class RunScore:
    """What a run reached, and what that took.

    Attributes:
        run: its folder.
        step: of the evaluation; None for a report that belongs to no step.
        flops: spent on training up to there; None if the run kept no ledger.
        scores: benchmark -> measure.
        spent: tokens and seconds up to there, by the names of `tracking.ledger.AMOUNTS`; those that the run logged.
    """

    run: str
    step: int | None
    flops: float | None
    scores: dict[str, float]
    spent: dict[str, float]

    @property
    def score(self) -> float:
        """Mean over the benchmarks."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation of a run, and what the run had spent when it was made."""

    run: Path
    step: int | None
    spent: dict[str, float]
    path: Path

    @property
    def flops(self) -> float | None:
        """None if the run kept no ledger."""
        return self.spent.get("flops")


def score_runs(config: CompareConfig) -> dict[str, list[RunScore]]:
    """Method -> scores of its runs, in their order; all asked the same problems in the same way.

    Raises:
        DataError: a run without evaluations, reports that differ in more than the model, a benchmark or measure that
            one of them lacks, or methods whose median compute differs by more than the tolerance and `compute` allows.
    """
    evaluated = {
        name: [_evaluations(Path(run), config.report) for run in runs] for name, runs in config.methods.items()
    }
    budget = None
    if config.compute == "match":
        budget = (1.0 + config.tolerance) * _smallest([run[-1] for runs in evaluated.values() for run in runs])
    chosen = {name: [_within(run, budget) for run in runs] for name, runs in evaluated.items()}
    everything = [each for runs in chosen.values() for each in runs]
    if config.compute != "report":
        _check_compute(chosen, config)
    reports = {each.path: Report.load(each.path) for each in everything}
    names = _benchmarks(config, reports)
    first = reports[everything[0].path]
    for report in reports.values():
        check_same(first, report, names)
    return {
        name: [
            RunScore(
                str(each.run),
                each.step,
                each.flops,
                _scores(each, reports[each.path], names, config.measure),
                each.spent,
            )
            for each in runs
        ]
        for name, runs in chosen.items()
    }


def compute_gap(flops: Sequence[float]) -> float:
    """By how much the largest of several methods' compute exceeds the smallest, as a share of it; 0 where all are 0."""
    if max(flops) == 0:
        return 0.0
    return max(flops) / min(flops) - 1.0 if min(flops) > 0 else float("inf")


def last_report(path: Path) -> Path:
    """The report that a path stands for: the file itself, or the last evaluation of a run folder.

    Raises:
        DataError: neither.
    """
    return path if path.is_file() else _evaluations(path, None)[-1].path


def _evaluations(run: Path, report: str | None) -> list[Evaluated]:
    if not run.is_dir():
        raise DataError("no such run folder", where=str(run))
    refuse_links_out(run)
    metrics = run / FILE_NAME
    spent = _spent_by_step(metrics) if metrics.is_file() else {}
    if report is not None:
        if not (run / report).is_file():
            raise DataError(f"the run has no report {report!r}", where=str(run))
        return [Evaluated(run, None, spent[max(spent)] if spent else {}, run / report)]
    folder = run / "evaluation"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = {int(match[1]): file for file in files if (match := _STEP.fullmatch(file.name))}
    if not found:
        raise DataError(
            "the run has no evaluations",
            where=str(run),
            hint="set `evaluation.every` in the recipe; or evaluate its model into the folder and name the `report`",
        )
    return [Evaluated(run, step, _spent(spent, step), found[step]) for step in sorted(found)]


def _spent_by_step(metrics: Path) -> dict[int, dict[str, float]]:
    """Step -> what had been spent after it."""
    events = read_events(metrics)
    found: dict[int, dict[str, float]] = {}
    for name in AMOUNTS:
        for step, amount in zip(*series(events, f"{name}_total"), strict=True):
            found.setdefault(step, {})[name] = amount
    return found


def _spent(spent: dict[int, dict[str, float]], step: int) -> dict[str, float]:
    if not spent:
        return {}
    before = [logged for logged in spent if logged <= step]
    return spent[max(before)] if before else dict.fromkeys(spent[max(spent)], 0.0)


def _smallest(last: Sequence[Evaluated]) -> float:
    _check_ledgers(last)
    return min(float(each.flops or 0.0) for each in last)


def _within(run: Sequence[Evaluated], budget: float | None) -> Evaluated:
    if budget is None:
        return run[-1]
    # The first evaluation is made before the first step, so that there is always one within the budget.
    inside = [each for each in run if each.flops is not None and each.flops <= budget]
    return inside[-1] if inside else run[0]


def _check_ledgers(evaluated: Sequence[Evaluated]) -> None:
    for each in evaluated:
        if each.flops is None:
            raise DataError(
                "the run has no `flops_total`, so it is not known what it spent",
                where=str(each.run / FILE_NAME),
                hint="compare with `compute: report`, and say that compute was not compared",
            )


def _check_compute(chosen: Mapping[str, Sequence[Evaluated]], config: CompareConfig) -> None:
    for runs in chosen.values():
        _check_ledgers(runs)
    flops = {name: median(float(each.flops or 0.0) for each in runs) for name, runs in chosen.items()}
    if compute_gap(list(flops.values())) <= config.tolerance:
        return
    least, most = min(flops, key=flops.__getitem__), max(flops, key=flops.__getitem__)
    hint = "`compute: match` scores each run within the smallest budget; `compute: report` goes on all the same"
    if config.compute == "match":
        hint = "evaluations are too far apart for these budgets: evaluate more often, or raise the tolerance"
    raise DataError(
        f"compute differs by more than {config.tolerance:.0%}: a run of {least} spent {flops[least]:.3g} FLOPs, one of "
        f"{most} {flops[most]:.3g}",
        where="compute",
        hint=hint,
    )


def _benchmarks(config: CompareConfig, reports: dict[Path, Report]) -> list[str]:
    named = [[benchmark.name for benchmark in report.benchmarks] for report in reports.values()]
    shared = [name for name in named[0] if all(name in names for names in named)]
    for name in config.benchmarks or ():
        if name not in shared:
            raise DataError(f"not every run was evaluated on {name!r}", where="benchmarks", hint=nearest(name, shared))
    if not shared:
        raise DataError("the runs share no benchmark", where=", ".join(config.methods))
    return config.benchmarks or shared


def _scores(evaluated: Evaluated, report: Report, names: Sequence[str], measure: str) -> dict[str, float]:
    metrics = {benchmark.name: benchmark.headline() for benchmark in report.benchmarks}
    for name in names:
        if measure not in metrics[name]:
            where = f"{evaluated.path}, {name}"
            raise DataError(f"no measure {measure!r}", where=where, hint=nearest(measure, metrics[name]))
    return {name: metrics[name][measure].value for name in names}
