"""`posttrain study`: tune each arm, run its cells look by look until every comparison is decided, and tell the result.

Which cells there are follows from the file and from the scores of finished cells alone. So a study that was killed and
is started again runs what is missing and ends with the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from posttrain.bounded_files import MAX_REPORT, read_json
from posttrain.errors import DataError
from posttrain.evaluation.runs import RunScore
from posttrain.evaluation.seeds import SeedComparison, comparison_of, in_words
from posttrain.evaluation.sequential import SequentialPlan, first_useful_look
from posttrain.safe_files import write_json_atomic, write_text_atomic
from posttrain.state.lock import locked
from posttrain.study.plan import cell_of, check_study
from posttrain.study.plan import in_words as setting_in_words
from posttrain.study.running import CellOutcome, CellRunner
from posttrain.study.schema import Setting, Study
from posttrain.study.table import markdown

SCHEMA = 1
LOCK, STUDY, TABLE, COMPARISON, PLOT = ".study.lock", "study.json", "table.md", "comparison.json", "curves.png"


@dataclass(slots=True)
class ArmResult:
    """What is known of an arm so far.

    Attributes:
        name: of the arm.
        setting: the one that is reported; None if no setting could be measured.
        tuned: settings with their mean score over the tuning seeds; None where a cell failed. Empty without a grid.
        outcomes: of the tuning cells, then of the reported ones in the order of the seeds.
    """

    name: str
    setting: Setting | None = None
    tuned: list[tuple[Setting, float | None]] = field(default_factory=list)
    tuning: list[CellOutcome] = field(default_factory=list)
    outcomes: list[CellOutcome] = field(default_factory=list)

    @property
    def failures(self) -> list[CellOutcome]:
        """Cells that failed."""
        return [each for each in [*self.tuning, *self.outcomes] if each.error]

    @property
    def complete(self) -> bool:
        """Whether it can be compared: it has a setting, and no reported cell failed."""
        return self.setting is not None and not any(each.error for each in self.outcomes)


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a study found.

    Attributes:
        study: it.
        arms: in the order of the file.
        comparison: over the seeds; None with fewer than two complete arms, or too few seeds for any decision.
        undecidable: why there is none; empty if there is one.
        changes: what of the plan changed after an earlier look at results.
    """

    study: Study
    arms: list[ArmResult]
    comparison: SeedComparison | None
    undecidable: str
    changes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; all that the table is made of."""
        return {
            "schema": SCHEMA,
            "study": self.study.config.study,
            "config": self.study.config.model_dump(mode="json", exclude_unset=True),
            "plan": _plan_of(self.study),
            "changes": self.changes,
            "arms": [_arm_dict(arm) for arm in self.arms],
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "undecidable": self.undecidable,
        }


def run_study(
    study: Study, *, jobs: int = 1, address: str | None = None, say: Callable[[str], None] = lambda line: None
) -> StudyResult:
    """Run what is missing of a study, and write `study.json`, `table.md`, `comparison.json` and `curves.png`.

    Args:
        study: as read; it is checked first.
        jobs: cells at once.
        address: as `CellRunner`.
        say: gets a line for every cell and decision.

    Raises:
        PosttrainError: something is wrong with an arm, which `check_study` finds before anything runs.
        KeyboardInterrupt: stopped by the user; the same call goes on from there.
    """
    check_study(study)
    with locked(study.output / LOCK, say, what="a study"):
        changes = _changes(study)
        runner = CellRunner(jobs, address, say)
        arms = [ArmResult(name) for name in study.config.arms]
        _tune(study, arms, runner, say)
        for seeds in _looks(study):
            asked = [arm for arm in arms if arm.setting is not None and _open(study, arms, arm)]
            cells = [cell_of(study, "reported", arm.name, arm.setting or {}, seed) for seed in seeds for arm in asked]
            if not cells:
                break
            for arm, outcome in zip(asked * len(seeds), runner.run(cells), strict=True):
                arm.outcomes.append(outcome)
            result = _result(study, arms, changes)
            write(result)
            if study.config.sequential is not None and result.comparison is not None:
                _tell(result.comparison, say)
        return _result(study, arms, changes)


def write(result: StudyResult) -> None:
    """Write all files of a result."""
    from posttrain.study.plot import draw

    output = result.study.output
    data = result.to_dict()
    write_json_atomic(output / STUDY, data)
    write_text_atomic(output / TABLE, markdown(data))
    if result.comparison is not None:
        write_json_atomic(output / COMPARISON, result.comparison.to_dict())
    draw(data, output / PLOT)


# -------------------------------------------------------------------------------------------------------------- rounds


def _tune(study: Study, arms: Sequence[ArmResult], runner: CellRunner, say: Callable[[str], None]) -> None:
    """Choose each arm's setting by the mean score over the tuning seeds; the first of the best."""
    places = [
        (arm, setting, seed)
        for seed in study.config.tuning
        for arm in arms
        for setting in study.config.settings(arm.name)
        if len(study.config.settings(arm.name)) > 1
    ]
    outcomes = runner.run([cell_of(study, "tuning", arm.name, setting, seed) for arm, setting, seed in places])
    for (arm, _, _), outcome in zip(places, outcomes, strict=True):
        arm.tuning.append(outcome)
    for arm in arms:
        settings = study.config.settings(arm.name)
        if len(settings) == 1:
            arm.setting = settings[0]
            continue
        arm.tuned = [
            (setting, _mean([each for each in arm.tuning if each.cell.setting == setting])) for setting in settings
        ]
        scored = [(score, setting) for setting, score in arm.tuned if score is not None]
        if scored:
            best = max(score for score, _ in scored)
            arm.setting = next(setting for score, setting in scored if score == best)
            say(f"{arm.name}: {setting_in_words(arm.setting)} is best of {len(settings)} settings, {100 * best:.1f}%")


def _mean(outcomes: Sequence[CellOutcome]) -> float | None:
    """Mean score; None if one failed: a setting that sometimes breaks is not chosen for the seeds on which it held."""
    results = [each.result for each in outcomes if each.result is not None]
    return fmean(_score(result) for result in results) if len(results) == len(outcomes) else None


def _looks(study: Study) -> list[list[int]]:
    """Seeds by look; without a sequential test all at once."""
    seeds, sequential = study.config.reported, study.config.sequential
    if sequential is None:
        return [seeds]
    size = sequential.seeds_per_look
    return [seeds[look * size : (look + 1) * size] for look in range(sequential.looks)]


def _open(study: Study, arms: Sequence[ArmResult], arm: ArmResult) -> bool:
    """Whether an arm still needs seeds: before the first look all do."""
    if not arm.outcomes:
        return True
    comparison, _ = _compare(study, arms)
    if comparison is None or not arm.complete:
        return False
    return any(
        each.outcome == "undecided" and arm.name in (each.first, each.second) for each in comparison.result.decisions
    )


def _tell(comparison: SeedComparison, say: Callable[[str], None]) -> None:
    look = comparison.result.looks
    for decision in comparison.result.decisions:
        if decision.look == look:
            say(f"look {look}: {in_words(decision)}")
    undecided = sum(each.outcome == "undecided" for each in comparison.result.decisions)
    say(f"look {look}: {undecided} pairs undecided")


# -------------------------------------------------------------------------------------------------------------- results


def _result(study: Study, arms: list[ArmResult], changes: list[str]) -> StudyResult:
    comparison, why = _compare(study, arms)
    return StudyResult(study, arms, comparison, why, changes)


def _compare(study: Study, arms: Sequence[ArmResult]) -> tuple[SeedComparison | None, str]:
    compared = [arm for arm in arms if arm.complete and arm.outcomes]
    if len(compared) < 2:
        return None, "fewer than two arms have been measured"
    sequential, seeds = study.config.sequential, len(study.config.reported)
    plan = SequentialPlan(seeds, 1) if sequential is None else sequential.plan
    if first_useful_look(plan) is None:
        return None, (f"{seeds} seeds of each arm cannot tell any two apart at an error of {plan.alpha:g}")
    runs = {arm.name: [_run_score(each) for each in arm.outcomes if each.result is not None] for arm in compared}
    evaluate = study.config.evaluate
    written = {
        "methods": list(runs),
        "benchmarks": list(next(iter(runs.values()))[0].scores),
        "measure": evaluate.measure,
        "seeds_per_look": plan.seeds_per_look,
        "looks": plan.looks,
        "alpha": plan.alpha,
        "tolerance": study.config.tolerance,
        "seed": plan.seed,
    }
    return comparison_of(runs, plan, written), ""


def _run_score(outcome: CellOutcome) -> RunScore:
    assert outcome.result is not None  # failed ones are left out
    result = outcome.result
    return RunScore(result["run"], result["steps"], result["spent"].get("flops"), result["scores"], result["spent"])


def _score(result: dict[str, Any]) -> float:
    return fmean(result["scores"].values())


def _arm_dict(arm: ArmResult) -> dict[str, Any]:
    return {
        "name": arm.name,
        "setting": arm.setting,
        "tuned": [{"setting": setting, "score": score} for setting, score in arm.tuned],
        "tuning": [_cell_dict(each) for each in arm.tuning],
        "cells": [_cell_dict(each) for each in arm.outcomes],
        "complete": arm.complete,
    }


def _cell_dict(outcome: CellOutcome) -> dict[str, Any]:
    cell, result = outcome.cell, outcome.result
    found: dict[str, Any] = {
        "seed": cell.seed,
        "setting": cell.setting,
        "key": cell.request.key,
        "error": outcome.error,
    }
    if result is not None:
        kept = ("run", "report", "steps", "scores", "beside", "spent", "bought", "curve")
        found |= {"score": _score(result), **{name: result[name] for name in kept}}
        found["answer_tokens"] = result.get("answer_tokens")  # none in what an earlier version measured
    return found


def _plan_of(study: Study) -> dict[str, Any]:
    """What must stay while a sequential test goes on, or its error is not what it says."""
    sequential, measure = study.config.sequential, study.config.evaluate.measure
    others = {name: study.config.evaluation(name).measure for name in study.config.arms}
    own = [f"{name}: {other}" for name, other in others.items() if other != measure]
    return {
        "arms": list(study.config.arms),
        "seeds": study.config.reported,
        "measure": "; ".join([measure, *own]),
        "sequential": None if sequential is None else sequential.model_dump(),
    }


def _changes(study: Study) -> list[str]:
    """How the plan differs from that of results which were there already, earlier changes included."""
    path = study.output / STUDY
    if not path.is_file():
        return []
    try:
        before = read_json(path, most=MAX_REPORT)
        kept, old = before["changes"], before["plan"]
    except (KeyError, TypeError) as error:
        raise DataError(f"not the file of a study: {error!r}", where=str(path), hint="move it away") from error
    new = [f"{key} was {old[key]}, is {value}" for key, value in _plan_of(study).items() if old[key] != value]
    return [*kept, *new]
