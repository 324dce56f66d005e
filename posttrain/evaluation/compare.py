"""Compare two reports problem by problem, and print reports and comparisons. Reads without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.errors import DataError
from posttrain.evaluation.report import BenchmarkReport, HarnessTask, Pass, Report, measures
from posttrain.evaluation.statistics import Interval, PairedTest, difference_interval, mean_interval, paired_test

MUCH_TRUNCATION = 0.05
"""Above this share of cut completions a report warns: accuracy then says more about the token limit than the model."""


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one benchmark, on the problems judged in both reports.

    Attributes:
        benchmark: name of the benchmark.
        metric: name of the metric.
        base: estimate of the base.
        other: estimate of the other.
        difference: other - base, paired by problem.
        test: of no difference.
        left_out: problems without a value in one of the reports.
    """

    benchmark: str
    metric: str
    base: Interval
    other: Interval
    difference: Interval
    test: PairedTest
    left_out: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two reports, compared benchmark by benchmark.

    Attributes:
        base: label of the base.
        other: label of the other.
        changes: one per benchmark and metric, in the order of the base report.
        only_in_one: benchmarks that only one report has.
        notes: what differs without making the comparison invalid (seed, versions, engine).
    """

    base: str
    other: str
    changes: tuple[Change, ...]
    only_in_one: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def compare_reports(base: Report, other: Report) -> Comparison:
    """Pair two reports by problem.

    The p-values are per row and not corrected for the number of rows.

    Raises:
        DataError: no shared benchmark; or template, problems, verifier or sampling differ, and which.
    """
    ours = {benchmark.name: benchmark for benchmark in base.benchmarks}
    theirs = {benchmark.name: benchmark for benchmark in other.benchmarks}
    shared = [name for name in ours if name in theirs]
    tasks = [{task.name: task for task in report.harness} for report in (base, other)]
    shared_tasks = [name for name in tasks[0] if name in tasks[1]]
    if not shared and not shared_tasks:
        raise DataError(
            "the reports share no benchmark",
            where=f"{base.model_label} and {other.model_label}",
            hint=f"one has {', '.join([*ours, *tasks[0]])}; the other {', '.join([*theirs, *tasks[1]])}",
        )
    check_same(base, other, shared)
    changes = [change for name in shared for change in _changes(ours[name], theirs[name])]
    for name in shared_tasks:
        changes += _task_changes(tasks[0][name], tasks[1][name], base, other)
    return Comparison(
        base=base.model_label,
        other=other.model_label,
        changes=tuple(changes),
        only_in_one=tuple(sorted((ours.keys() ^ theirs.keys()) | (tasks[0].keys() ^ tasks[1].keys()))),
        notes=tuple(_notes(base, other, [(ours[name], theirs[name]) for name in shared])),
    )


def check_same(base: Report, other: Report, names: Sequence[str]) -> None:
    """Check that two reports asked the same in the same way.

    Args:
        base: a report.
        other: another one.
        names: benchmarks that both have.

    Raises:
        DataError: template, problems, verifier or sampling differ, and which.
    """
    if base.template_hash != other.template_hash:
        raise _refusal("chat template", base.template_hash[:12], other.template_hash[:12], base, other)
    for name in names:
        ours, theirs = (next(each for each in report.benchmarks if each.name == name) for report in (base, other))
        _check_same(ours, theirs, base, other)


def comparison_table(comparison: Comparison) -> list[dict[str, str]]:
    """The rows of a comparison as text: benchmark, metric, base, other, difference (in points) and p."""
    return [
        {
            "benchmark": change.benchmark,
            "metric": change.metric,
            "base": _percent(change.base),
            "other": _percent(change.other),
            "difference": _percent(change.difference, sign=True),
            "p": _p_value(change.test.p),
        }
        for change in comparison.changes
        if change.metric != "pass@1"  # avg@n says the same
    ]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a comparison, one block per benchmark, in 80 columns."""
    console.print(Text(f"base:  {comparison.base}\nother: {comparison.other}"))
    rows = comparison_table(comparison)
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        changes = [change for change in comparison.changes if change.benchmark == name]
        most = max(change.base.problems for change in changes)
        console.print()
        console.print(Text(f"{name}, {most:,} problems", style="bold"))
        table = _table(metric=9, base=18, other=18, difference=20, p=7)
        for row in rows:
            if row["benchmark"] == name:
                table.add_row(*(row[column] for column in ("metric", "base", "other", "difference", "p")))
        console.print(table)
        left_out = max(change.left_out for change in changes)
        if left_out:
            console.print(Text(f"{left_out} problems without a verdict in one of the reports were left out"))
    console.print()
    console.print(
        Text(
            "Percent, with 95% intervals clustered by problem; differences in points, paired by problem; p from a "
            "sign-flip test, not corrected for the number of rows.",
            style="dim",
        )
    )
    if comparison.only_in_one:
        console.print(Text(f"only in one report: {', '.join(comparison.only_in_one)}"))
    for note in comparison.notes:
        console.print(Text(f"note: {note}"))


def print_report(report: Report, console: Console) -> None:
    """Print one report, one block per benchmark, in 80 columns."""
    console.print(Text.assemble(report.model_label, (f"  {report.created}, {report.seconds:.0f} s", "dim")))
    for benchmark in report.benchmarks:
        sampling = benchmark.sampling
        console.print()
        console.print(
            Text.assemble(
                (benchmark.name, "bold"),
                f", {len(benchmark.records):,} problems; {sampling.samples} sampled at temperature "
                f"{sampling.temperature:g}, at most {sampling.max_new_tokens} tokens",
            )
        )
        table = _table(metric=9, accuracy=20, interval=20, problems=8)
        for name, interval in benchmark.metrics.items():
            if name == "pass@1":  # avg@n says the same
                continue
            if interval is None:
                table.add_row(name, "none judged", "", "0")
            else:
                table.add_row(name, _percent(interval), interval.method, f"{interval.problems:,}")
        console.print(table)
        passes = {"greedy": benchmark.greedy, "beam": benchmark.beam, "revised": benchmark.revised}
        for label, counts in (passes | {"sampled": benchmark.sampled}).items():
            if counts is not None:
                console.print(Text(f"{label + ':':9}{_describe(counts)}"))
        for warning in _warnings(benchmark):
            console.print(Text(warning, style="yellow"))
    for task in report.harness:
        _print_task(task, console)


# --------------------------------------------------------------------------------------------------------- comparing


def _check_same(ours: BenchmarkReport, theirs: BenchmarkReport, base: Report, other: Report) -> None:
    where = f"{ours.name}: "
    if ours.problem_hash != theirs.problem_hash:
        sizes = [
            f"{len(benchmark.records)} problems, hash {benchmark.problem_hash[:12]}" for benchmark in (ours, theirs)
        ]
        raise _refusal(where + "problems or their prompt template", sizes[0], sizes[1], base, other)
    if ours.verifier != theirs.verifier:
        raise _refusal(where + "verifier", ours.verifier, theirs.verifier, base, other)
    mine, its = asdict(ours.sampling), asdict(theirs.sampling)
    # Pairing is by problem, not by draw: other seeds and other k do not bias a difference. What only one report
    # measures is not compared.
    free = {"seed", "k", "maj", "beams", "revisions"}
    free |= {"revision_template"} if not (mine["revisions"] and its["revisions"]) else set()
    for key in mine:
        if key not in free and mine[key] != its[key]:
            raise _refusal(where + key, mine[key], its[key], base, other)


def _refusal(what: str, ours: Any, theirs: Any, base: Report, other: Report) -> DataError:
    return DataError(
        f"the reports cannot be compared, they differ in {what}: {ours} and {theirs}",
        where=f"{base.model_label} and {other.model_label}",
        hint="evaluate both with the same settings",
    )


def _changes(ours: BenchmarkReport, theirs: BenchmarkReport) -> list[Change]:
    both, changes = measures(theirs.sampling), []
    for name, measure in measures(ours.sampling).items():
        if name not in both:
            continue
        before, after = measure(ours.records), measure(theirs.records)
        known = ~(np.isnan(before) | np.isnan(after))
        if not known.any():
            continue
        before, after = before[known], after[known]
        changes.append(
            Change(
                benchmark=ours.name,
                metric=name,
                base=mean_interval(before),
                other=mean_interval(after),
                difference=difference_interval(before, after),
                test=paired_test(before, after),
                left_out=int((~known).sum()),
            )
        )
    return changes


def _task_changes(ours: HarnessTask, theirs: HarnessTask, base: Report, other: Report) -> list[Change]:
    for key in ("version", "settings", "problem_hash"):
        if getattr(ours, key) != getattr(theirs, key):
            raise _refusal(f"{ours.name}: {key}", getattr(ours, key), getattr(theirs, key), base, other)
    return [
        Change(
            benchmark=ours.name,
            metric=metric,
            base=mean_interval(before),
            other=mean_interval(theirs.values[metric]),
            difference=difference_interval(before, theirs.values[metric]),
            test=paired_test(before, theirs.values[metric]),
            left_out=0,
        )
        for metric, before in ours.values.items()
        if metric in theirs.values
    ]


def _notes(base: Report, other: Report, shared: Sequence[tuple[BenchmarkReport, BenchmarkReport]]) -> list[str]:
    pairs = {
        **({"seed": (shared[0][0].sampling.seed, shared[0][1].sampling.seed)} if shared else {}),
        "engine": (base.engine, other.engine),
        **{
            name: (base.versions.get(name, "absent"), other.versions.get(name, "absent"))
            for name in sorted(base.versions.keys() | other.versions.keys())
        },
    }
    return [f"{name} differs: {left} and {right}" for name, (left, right) in pairs.items() if left != right]


# ---------------------------------------------------------------------------------------------------------- printing


def _table(**columns: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for index, (name, width) in enumerate(columns.items()):
        table.add_column(name, min_width=width, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _print_task(task: HarnessTask, console: Console) -> None:
    shots = f"{task.settings['fewshot']} examples in the prompt"
    console.print()
    console.print(Text.assemble((task.name, "bold"), f", lm-eval task version {task.version}, {shots}"))
    table = _table(metric=28, value=20, interval=18, problems=8)
    for metric, interval in task.metrics.items():
        table.add_row(metric, _percent(interval), interval.method, f"{interval.problems:,}")
    for metric, value in task.other.items():
        table.add_row(metric, f"{value:.4g}", "none", "")
    console.print(table)


def _percent(interval: Interval, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    low, high = (f"{100 * end:{form}}" for end in (interval.low, interval.high))
    return f"{100 * interval.value:{form}} [{low}, {high}]"


def _p_value(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def _describe(counts: Pass) -> str:
    parts = [
        f"mean {counts.mean_length:.1f} tokens",
        f"cut {counts.truncation_rate:.1%}",
        f"no answer {counts.no_answer_rate:.1%}",
    ]
    if counts.drawn_tokens:
        parts.append(f"{counts.drawn_tokens / counts.completions:.1f} tokens drawn for each")
    if counts.unrevised:
        parts.append(f"{counts.unrevised} left unrevised for want of room")
    if counts.unknown:
        parts.append("not judged " + ", ".join(f"{number} {status}" for status, number in counts.unknown.items()))
    return ", ".join(parts)


def _warnings(benchmark: BenchmarkReport) -> Sequence[str]:
    every = [benchmark.greedy, benchmark.sampled, benchmark.beam, benchmark.revised]
    passes = [counts for counts in every if counts is not None]
    warnings = []
    if max(counts.truncation_rate for counts in passes) > MUCH_TRUNCATION:
        warnings.append("many completions were cut: raise max_new_tokens before trusting these numbers")
    if benchmark.repeated:
        warnings.append(f"{benchmark.repeated} problems of the source repeat an earlier one and were left out")
    return warnings
