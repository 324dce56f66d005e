"""What the report is made of: runs, evaluations and comparisons, found in the paths that were given. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from posttrain.api import Run, load_run
from posttrain.bounded_files import MAX_REPORT, read_json
from posttrain.errors import DataError
from posttrain.evaluation.compare import Comparison, compare_reports
from posttrain.evaluation.compare_pairs import PairChange, all_pairs, compare_pairs, last_pairs
from posttrain.evaluation.report import Report
from posttrain.report.studies import KEYS as STUDY_KEYS
from posttrain.report.studies import study_of
from posttrain.safe_files import refuse_links_out
from posttrain.tracking.events import FILE_NAME

STAGE = "stage.json"
"""What every finished stage of a pipeline has in its folder."""

STUDIES = ("study.json", "comparison.json")
"""What a study has in its folder: all of it, and its comparison over seeds alone."""


@dataclass(frozen=True, slots=True)
class EvaluationFile:
    """One evaluation of a model, as a report shows it.

    Attributes:
        name: unique, for people.
        report: what was found.
        run: name of the run that made it between its steps; None for one made by itself.
        step: of that run.
    """

    name: str
    report: Report
    run: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class ComparisonFile:
    """Two runs side by side.

    Attributes:
        name: unique, for people.
        table: a `Comparison` as plain data; None where the two cannot be compared.
        pairs: what changed on held-out pairs.
        refused: why they cannot be compared.
        run: name of the run of which these are beginning and end.
        path: the file it was read from.
    """

    name: str
    table: dict[str, Any] | None = None
    pairs: tuple[PairChange, ...] = ()
    refused: str = ""
    run: str | None = None
    path: Path | None = None


@dataclass(slots=True)
class ReportSources:
    """Everything that a report is made of.

    Attributes:
        runs: name -> run, in the order given.
        evaluations: those of the runs, and reports.
        comparisons: beginning and end of each run, tables of pipelines, evaluations and runs among each other.
        studies: name -> study, as `report.studies` has it.
        over_seeds: name -> comparison over seeds, as plain data.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    evaluations: list[EvaluationFile] = field(default_factory=list)
    comparisons: list[ComparisonFile] = field(default_factory=list)
    studies: dict[str, dict[str, Any]] = field(default_factory=dict)
    over_seeds: dict[str, dict[str, Any]] = field(default_factory=dict)


def collect(paths: Sequence[Path]) -> ReportSources:
    """Read all that the paths name.

    Args:
        paths: folders of runs, pipelines or studies, and files: evaluation reports, comparisons, studies.

    Raises:
        DataError: a path that is none of these, or a file that cannot be read.
    """
    found = ReportSources()
    files = list(dict.fromkeys(file.resolve() for path in paths for file in _parts(path)))
    names = dict(zip(files, _names(files), strict=True))
    for path, name in names.items():
        if path.is_dir():
            _add_run(found, name, load_run(path))
        else:
            _add_file(found, name, path)
    _compare_among(found)
    return found


# -------------------------------------------------------------------------------------------------------------- paths


def _parts(path: Path) -> Iterator[Path]:
    """Run folders and files that a path stands for."""
    if path.is_file() or (path / FILE_NAME).is_file():
        yield path
        return
    refuse_links_out(path)
    if not path.is_dir():
        raise DataError("no such folder or file", where=str(path), hint="give the output folder of a run")
    study = next((path / name for name in STUDIES if (path / name).is_file()), None)
    if study is not None:
        yield study
        return
    stages = sorted(path.glob(f"*/{STAGE}"), key=_started)
    for stage in stages:
        folder = stage.parent
        refuse_links_out(folder)
        candidates = (folder / FILE_NAME, folder / "report.json", folder / "table.json")
        yield from (folder if each.name == FILE_NAME else each for each in candidates if each.is_file())
    if not stages:
        raise DataError(
            f"neither a run ({FILE_NAME}) nor a pipeline ({STAGE} in its folders)",
            where=str(path),
            hint="give the output folder of a run, pipeline or study, or a report of `posttrain eval` or `compare`",
        )


def _started(stage: Path) -> str:
    try:
        return str(read_json(stage)["started"])
    except (TypeError, KeyError, DataError) as error:
        raise DataError("not the record of a stage", where=str(stage)) from error


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; of a stage's file the stage."""
    paths = [
        path.parent if path.is_file() and ((path.parent / STAGE).is_file() or path.name == STUDIES[-1]) else path
        for path in files
    ]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in files]


# ------------------------------------------------------------------------------------------------------------ records


def _add_run(found: ReportSources, name: str, run: Run) -> None:
    found.runs[name] = run
    made = [
        EvaluationFile(f"{name}, step {step}", Report.from_data(data, where=f"{run.folder}, step {step}"), name, step)
        for step, data in sorted(run.evaluations.items())
    ]
    found.evaluations += made
    files = all_pairs(run.folder)
    changed = compare_pairs(files[min(files)], files[max(files)]) if len(files) > 1 else []
    # Accuracy is against the start, where every pair is a tie: its own beginning says nothing.
    pairs = tuple(change for change in changed if change.measure != "accuracy")
    if len(made) > 1:
        found.comparisons.append(_compared(made[0], made[-1], pairs=pairs, run=name))
    elif pairs:
        label = f"{name}, step {max(files)} against step {min(files)}"
        found.comparisons.append(ComparisonFile(label, pairs=pairs, run=name))


def _add_file(found: ReportSources, name: str, path: Path) -> None:
    data = read_json(path, most=MAX_REPORT)
    keys = set(data) if isinstance(data, dict) else set()
    if keys >= {"schema", "benchmarks"}:
        found.evaluations.append(EvaluationFile(name, Report.from_data(data, where=str(path))))
    elif keys >= {"base", "other", "changes"}:
        found.comparisons.append(ComparisonFile(name, table=data, path=path))
    elif keys >= STUDY_KEYS:
        found.studies[name] = study_of(data, str(path))
    elif keys >= {"plan", "methods", "result"}:
        found.over_seeds[name] = data
    else:
        raise DataError(
            "neither an evaluation report nor a comparison",
            where=str(path),
            hint="`posttrain eval --output` and `posttrain compare --output` write such files",
        )


def _compare_among(found: ReportSources) -> None:
    """Evaluations that belong to no run, and the last ones of the runs: each with those after it, unless done."""
    done = {(each.table["base"], each.table["other"]) for each in found.comparisons if each.table}
    for base, other in combinations([each for each in found.evaluations if each.run is None], 2):
        if (base.report.model_label, other.report.model_label) not in done:
            found.comparisons.append(_compared(base, other))
    last = {each.run: each for each in found.evaluations}
    for first, second in combinations(found.runs, 2):
        if first in last and second in last:
            found.comparisons.append(_compared(last[first], last[second]))
        files = [last_pairs(found.runs[name].folder) for name in (first, second)]
        if files[0] is not None and files[1] is not None:
            found.comparisons.append(_compared_pairs(f"{second} against {first}, held-out pairs", files[0], files[1]))


def _compared_pairs(name: str, base: Path, other: Path) -> ComparisonFile:
    try:
        return ComparisonFile(name, pairs=tuple(compare_pairs(base, other)))
    except DataError as error:
        return ComparisonFile(name, refused=str(error))


def _compared(base: EvaluationFile, other: EvaluationFile, **further: Any) -> ComparisonFile:
    name = f"{other.name} against {base.name}"
    try:
        comparison: Comparison = compare_reports(base.report, other.report)
    except DataError as error:
        return ComparisonFile(name, refused=str(error), **further)
    labels = {"base": base.name, "other": other.name}
    return ComparisonFile(name, table=comparison.to_dict() | labels, **further)
