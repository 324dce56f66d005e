"""One cell of a study, in a process of its own. Killed anywhere, it goes on there.

Its stages are those of a pipeline, which keeps what is done and resumes what was broken off. With a budget the number
of steps of the measured stage is what the stages before it, its traces and a probe of a few steps leave; it is written
down before that stage begins, so that a resumed cell trains as long as the first attempt meant to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.config.locations import Locations
from posttrain.data.traces import read_traces
from posttrain.errors import PosttrainError, RecipeError
from posttrain.evaluation.arms import unit_of
from posttrain.evaluation.report import Report
from posttrain.imports import importing
from posttrain.pipeline.runner import run_stages, stages_of
from posttrain.pipeline.schema import PipelineConfig, build_pipeline
from posttrain.pipeline.stages import SPENT, STAGES, Stage, as_written
from posttrain.rollouts.collect import Collected
from posttrain.safe_files import clear, refuse_others, write_json_atomic
from posttrain.study.lifeline import stop_with
from posttrain.study.plan import CellRequest
from posttrain.terminal import console, guard, say
from posttrain.tracking.events import FILE_NAME, metrics_of, read_events
from posttrain.tracking.ledger import AMOUNTS, UNITS
from posttrain.verifiers.worker import die_with

REQUEST, RESULT, STEPS, PROBE, LOG = "request.json", "result.json", "steps.json", "probe", "log.txt"

Spent = dict[str, float]
"""Amounts by the names of `tracking.ledger.AMOUNTS`."""


def run_cell(folder: Path) -> None:
    """Run what `request.json` of the folder asks for and write `result.json`.

    Raises:
        PosttrainError: as the stages; or the budget leaves no step.
    """
    request = CellRequest(**json.loads((folder / REQUEST).read_text(encoding="utf-8")))
    if request.measured is None:
        _run(request, request.stages)
        write_json_atomic(folder / RESULT, {"key": request.key})
        return
    measured = next(n for n, stage in enumerate(request.stages) if stage["name"] == request.measured)
    steps = None
    if request.budget is not None:
        steps = _steps_within(request, measured)
    stages = _run(request, _with_steps(request, measured, steps))
    report = Report.load(Path(request.output) / request.evaluation / "report.json")
    before, bought = _spent_by(stages[:measured]), _bought(request)
    here = _spent_by([stages[measured]])
    scores = {each.name: each.headline()[request.measure].value for each in report.benchmarks}
    beside = {name: scores.pop(name) for name in request.beside}
    result = {
        "key": request.key,
        "run": str(stages[measured].folder),
        "report": str(Path(request.output) / request.evaluation / "report.json"),
        "steps": _last_step(stages[measured]),
        "scores": scores,
        "beside": beside,
        "answer_tokens": fmean(each.tokens_of(request.measure) for each in report.benchmarks if each.name in scores),
        "spent": _sum(before, here, bought),
        "bought": bought,
        "curve": _curve(stages[measured], request.measure, list(scores), _sum(before, bought)),
    }
    write_json_atomic(folder / RESULT, result)


# -------------------------------------------------------------------------------------------------------------- steps


def _steps_within(request: CellRequest, measured: int) -> int:
    """Steps of the measured stage that the budget leaves."""
    folder = Path(request.output)
    if (folder / STEPS).exists():
        refuse_others(folder / STEPS)
        known = json.loads((folder / STEPS).read_text(encoding="utf-8"))
        if known["key"] == request.key:
            return known["steps"]
    assert request.budget is not None  # or nobody asks
    unit, probe = _unit(request.budget), request.budget["probe"]
    stage = {**request.stages[measured], "name": PROBE}
    off: dict[str, Any] = {"training.max_steps": probe, "evaluation": None}
    stage["set"] = {**(stage.get("set") or {}), **off}
    clear(folder / PROBE)  # a probe that was broken off says nothing
    *before, ran = _run(request, [*request.stages[:measured], stage])
    recipe: Any = _pipeline(request, request.stages[: measured + 1])[1][-1].resolved(as_written)
    once, per_step = price(_ledger(ran.folder), unit, written=recipe.data.prompts is None)
    left = request.budget[unit] - once - unit_of(_sum(_spent_by(before), _bought(request)), unit)
    clear(folder / PROBE)
    if per_step:
        steps = int(left / per_step)
    else:  # training takes nothing of this unit, and goes on as long as its recipe says
        steps = recipe.training.max_steps if left >= 0 else 0
    if steps < 1:
        raise RecipeError(
            f"the budget of {request.budget[unit]:.3g} {unit} leaves {left:.3g} for training, of which a step takes "
            f"{per_step:.3g}",
            where="budget",
            hint="raise it, or let earlier stages and traces take less; `budget.traces: sunk` charges no traces",
        )
    write_json_atomic(folder / STEPS, {"key": request.key, "steps": steps, "per_step": per_step})
    return steps


def price(ledger: Sequence[tuple[int, Spent]], unit: str, *, written: bool) -> tuple[float, float]:
    """What a run takes before its first step, such as the reference's scores of all rows, and what a step takes.

    Only of rows that are `written` each step does the same. Of rollouts the first step may sample for several, so
    what it takes more is not known to be taken once.
    """
    (start, low), (end, high) = ((step, unit_of(spent, unit)) for step, spent in (ledger[1], ledger[-1]))
    if not written or start == end:
        return 0.0, high / end
    per_step = (high - low) / (end - start)
    return max(low - start * per_step, 0.0), per_step


def _unit(budget: Mapping[str, Any]) -> str:
    return next(name for name in UNITS if budget[name] is not None)


def _with_steps(request: CellRequest, measured: int, steps: int | None) -> list[dict[str, Any]]:
    """The stages, the measured one with its number of steps and its evaluations."""
    if steps is None and request.points is None:
        return request.stages
    stage = dict(request.stages[measured])
    changed = dict(stage.get("set") or {})
    if steps is not None:
        changed["training.max_steps"] = steps
    if request.points is not None:
        stage["set"] = changed
        recipe: Any = _pipeline(request, [*request.stages[:measured], stage])[1][-1].resolved(as_written)
        every = max(recipe.training.max_steps // request.points, 1)
        changed["evaluation"] = {**(request.evaluate or {}), "every": every}
    stage["set"] = changed
    return [*request.stages[:measured], stage, *request.stages[measured + 1 :]]


def _run(request: CellRequest, stages: list[dict[str, Any]]) -> list[Stage]:
    config, made = _pipeline(request, stages)
    run_stages(config, made, console(), last=len(made) - 1, command="the study's")
    return made


def _pipeline(request: CellRequest, stages: list[dict[str, Any]]) -> tuple[PipelineConfig, list[Stage]]:
    locations = Locations(request.file)
    config = build_pipeline({"pipeline": "cell", "output": request.output, "stages": stages}, locations, STAGES)
    return config, stages_of(config, locations, Path(request.file))


# --------------------------------------------------------------------------------------------------------------- spent


def _spent_by(stages: list[Stage]) -> Spent:
    """The ledgers of all training runs among the stages."""
    return _sum(*(_ledger(stage.folder)[-1][1] for stage in stages if stage.entry.kind == "train"))


def _ledger(run: Path) -> list[tuple[int, Spent]]:
    """(step, spent by then) of every step that the run logged it for; nothing was by step 0."""
    found: list[tuple[int, Spent]] = [(0, {})]
    for event in read_events(run / FILE_NAME):
        logged = metrics_of(event)
        spent = {name: logged[f"{name}_total"] for name in AMOUNTS if f"{name}_total" in logged}
        if spent:
            found.append((event["step"], spent))
    return found


def _last_step(stage: Stage) -> int:
    return max(event["step"] for event in read_events(stage.folder / FILE_NAME))


def _bought(request: CellRequest) -> Spent:
    """What sampling the charged traces took; seconds are not known."""
    found: list[Spent] = []
    for path in map(Path, request.bought):
        if (path.parent / SPENT).is_file():
            found.append(json.loads((path.parent / SPENT).read_text(encoding="utf-8")))
            continue
        cost = Collected.of(path, 0, read_traces([path]).traces)
        found.append({"tokens_prompt": cost.read_tokens, "tokens_sampled": cost.new_tokens, "flops": cost.flops})
    return _sum(*found)


def _sum(*amounts: Mapping[str, float]) -> Spent:
    return {
        name: sum(each[name] for each in amounts if name in each)
        for name in AMOUNTS
        if any(name in each for each in amounts)
    }


def _curve(stage: Stage, measure: str, benchmarks: list[str], before: Spent) -> list[dict[str, float]]:
    """Score and compute at each measurement of the training run on all benchmarks of the study."""
    ledger, curve = _ledger(stage.folder), []
    for event in read_events(stage.folder / FILE_NAME):
        logged = metrics_of(event)
        keys = [f"eval/{name}/{measure}" for name in benchmarks]
        if all(key in logged for key in keys):
            total = _sum(before, [amounts for step, amounts in ledger if step <= event["step"]][-1])
            point = {unit: unit_of(total, unit) for unit in UNITS}
            curve.append({"step": event["step"], "score": fmean(logged[key] for key in keys), **point})
    return curve


def run_process(folder: str, environment: Mapping[str, str], study: Connection) -> None:
    """All that the process of a cell does; what it prints, and the error it ends with, is added to `log.txt`.

    Args:
        folder: of the cell.
        environment: changed before anything runs.
        study: its `lifeline`.
    """
    die_with(os.getppid())
    stop_with(study)
    os.setsid()  # Ctrl-C of a terminal goes to the study alone, which asks each cell once to save
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    guard()
    with importing():  # done by the server: a collection, which transformers asks for, would copy every page of it
        pass
    try:
        run_cell(Path(folder))
    except PosttrainError as error:
        say(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
