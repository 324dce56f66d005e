"""Which checkpoint of a run is the best, by its evaluation reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.config.schema import BestConfig, EvaluationConfig
from posttrain.errors import DataError, RecipeError, nearest
from posttrain.evaluation.benchmarks import resolve
from posttrain.evaluation.passes import extracts_answers
from posttrain.evaluation.report import Report
from posttrain.evaluation.statistics import Interval
from posttrain.safe_files import write_json_atomic


@dataclass(frozen=True, slots=True)
class Best:
    """The best checkpoint of a run so far.

    Attributes:
        step: of the best checkpoint.
        measured: its measure, with the interval.
        not_worse: other steps whose estimate lies in that interval: the data do not tell them from the best.
    """

    step: int
    measured: Interval
    not_worse: tuple[int, ...]


def best_step(reports: Mapping[int, Report], rule: BestConfig) -> Best:
    """The step with the highest measure; of equal ones the earliest, which took the least compute.

    The winner's own score is too high, since it was chosen for it: report a score on problems that had no part in the
    choice. Reports in which no problem could be judged are passed over.

    Args:
        reports: step -> report of that step.
        rule: `evaluation.best`.

    Raises:
        DataError: no report has this measure of this benchmark; names the nearest.
    """
    found: dict[int, Interval] = {}
    known: set[str] = set()
    for step, report in sorted(reports.items()):
        for benchmark in report.benchmarks:
            known |= {f"{benchmark.name} {measure}" for measure in benchmark.metrics}
            if benchmark.name == rule.benchmark and (interval := benchmark.headline().get(rule.measure)) is not None:
                found[step] = interval
    if not found:
        wanted = f"{rule.benchmark} {rule.measure}"
        hint = "none of its problems could be judged" if wanted in known else nearest(wanted, known)
        raise DataError(f"no evaluation has {wanted!r}", where="evaluation.best", hint=hint)
    # The first of the highest: steps are in order.
    step = max(found, key=lambda step: found[step].value)
    near = tuple(other for other, interval in found.items() if other != step and interval.value >= found[step].low)
    return Best(step, found[step], near)


def write_best(run_dir: Path, rule: BestConfig) -> str:
    """Find the best evaluated step of a run, write it to `best.json` in its folder, and say it in a line. Errors as for
    `best_step`."""
    paths = sorted((run_dir / "evaluation").glob("step-*.json"))
    best = best_step({int(path.stem.removeprefix("step-")): Report.load(path) for path in paths}, rule)
    write_json_atomic(run_dir / "best.json", {"rule": rule.model_dump(), **asdict(best)})
    return f"best by {rule.benchmark} {rule.measure}: step {best.step}, {best.measured.value:.3f}"


def check_best(config: EvaluationConfig) -> None:
    """Check before training that the rule can be applied after it.

    Raises:
        RecipeError: the benchmark is not evaluated, or has no such measure.
    """
    if config.best is None:
        return
    benchmarks = {benchmark.name: benchmark for benchmark in resolve(config.benchmarks, config.benchmark_paths)}
    if config.best.benchmark not in benchmarks:
        raise RecipeError(
            f"{config.best.benchmark!r} is not evaluated",
            where="evaluation.best.benchmark",
            hint=nearest(config.best.benchmark, benchmarks),
        )
    measures = ["greedy"] * config.greedy + [f"avg@{config.samples}"] + [f"pass@{k}" for k in config.k]
    measures += [f"beam@{config.beams}"] * (config.beams is not None)
    measures += [f"revision@{i}" for i in range(config.revisions + 1) if config.revisions]
    if extracts_answers(benchmarks[config.best.benchmark]):
        measures += [f"maj@{k}" for k in config.maj]
    if config.best.measure not in measures:
        raise RecipeError(
            f"{config.best.measure!r} is not measured",
            where="evaluation.best.measure",
            hint=nearest(config.best.measure, measures),
        )
