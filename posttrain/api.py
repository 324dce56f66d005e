"""What `import posttrain` offers: training, evaluation, sampling and comparison from Python, and runs read back.

Each is what the command of the same name does. Imports without torch; what needs it is imported when it is called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.bounded_files import MAX_REPORT, parse_json, read_json, whole_lines
from posttrain.config.collection import SampleConfig
from posttrain.config.loading import build_recipe, parse_config
from posttrain.config.loading import load_recipe as read_recipe
from posttrain.config.locations import Locations
from posttrain.config.overrides import apply_overrides
from posttrain.config.schema import ModelConfig, Recipe
from posttrain.config.workers import EvaluationRun
from posttrain.config.yaml_file import read_file
from posttrain.errors import DataError, RecipeError
from posttrain.methods import CONFIGS
from posttrain.safe_files import refuse_links_out
from posttrain.state.objects import written_down
from posttrain.tracking.events import FILE_NAME, metrics_of, read_events

if TYPE_CHECKING:
    import pandas

    from posttrain.evaluation.compare import Comparison
    from posttrain.evaluation.report import Report
    from posttrain.rollouts.collect import Collected
    from posttrain.trainers.run import RunResult

Source = str | Path | Mapping[str, Any]
"""A YAML file, or what stands in one as a dictionary."""

Overrides = Mapping[str, Any] | Sequence[str] | None
"""`{"training.max_steps": 50}`, or `["training.max_steps=50"]` as on the command line."""


def load_recipe(recipe: Source | Recipe, overrides: Overrides = None) -> Recipe:
    """A validated recipe.

    In a dictionary, data may be rows in memory (a `datasets.Dataset`, a pandas DataFrame, a list of dictionaries) where
    a path stands in a file, and a reward may be a function. Both are written to `<output>/inputs`, so that the run can
    be resumed and repeated without this process.

    Args:
        recipe: a file, a dictionary with the same keys, or a recipe, which is given back.
        overrides: dotted keys; later ones win.

    Raises:
        RecipeError: as the command line says it.
        DataError: rows in memory that JSON cannot hold.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides have no effect on a recipe that is loaded already", hint="give them to it")
        return recipe
    if not isinstance(recipe, Mapping):
        return read_recipe(recipe, _texts(overrides), CONFIGS)
    locations = Locations("recipe")
    data = written_down(recipe)
    apply_overrides(data, locations, _texts(overrides))
    return build_recipe(data, locations, CONFIGS)


def train(
    recipe: Source | Recipe,
    overrides: Overrides = None,
    *,
    resume: str | Path | None = None,
    trust_checkpoint: bool = False,
) -> RunResult:
    """Run a recipe; see `posttrain.trainers.run.train` for what comes back and what is raised.

    Under `accelerate launch` every rank calls it. In a notebook or a thread signals are not caught.

    Args:
        recipe, overrides: as `load_recipe`.
        resume: `auto`, or a checkpoint folder.
        trust_checkpoint: also from one of DeepSpeed or FSDP that somebody else wrote, whose loading may run code.
    """
    loaded = load_recipe(recipe, overrides)
    from posttrain.trainers.run import train as run

    return run(loaded, resume=None if resume is None else str(resume), trust_checkpoint=trust_checkpoint)


def evaluate(
    model: str | Path | Mapping[str, Any],
    config: Source | None = None,
    *,
    output: str | Path | None = None,
    **keys: Any,
) -> Report:
    """Accuracies of a model with intervals.

    Args:
        model: folder or Hub id, or a `model` section.
        config: file or dictionary with the keys of a recipe's `evaluation` section.
        output: file for the report; with one, an interrupted evaluation goes on when it is called again.
        keys: further keys, which win: `benchmarks=["gsm8k"], samples=4`.

    Raises:
        PosttrainError: as `evaluation.runner.evaluate_model`.
    """
    section = dict(model) if isinstance(model, Mapping) else {"path": str(model)}
    data, locations = _section(config, "evaluation")
    policy = parse_config(section, ModelConfig, (), Locations("model"))
    settings = parse_config(data, EvaluationRun, _texts(keys), locations)
    from posttrain.evaluation.runner import evaluate_model

    return evaluate_model(policy, settings, None if output is None else Path(output))


def sample(config: Source, overrides: Overrides = None) -> Collected:
    """Many verified completions per prompt, into the trace file that `output` names.

    Args:
        config: file or dictionary with the keys of `posttrain sample`.
        overrides: as `load_recipe`.

    Raises:
        PosttrainError: as `rollouts.collect.collect`.
    """
    data, locations = _section(config, "sample")
    settings = parse_config(data, SampleConfig, _texts(overrides), locations)
    from posttrain.rollouts.collect import collect

    return collect(settings, Path(settings.output), say=lambda _: None)


def compare(base: str | Path | Report, other: str | Path | Report) -> Comparison:
    """Two evaluations, paired by problem.

    Args:
        base, other: reports, files of them, or run folders, whose last evaluation counts.

    Raises:
        DataError: as `evaluation.compare.compare_reports`.
    """
    from posttrain.evaluation.compare import compare_reports
    from posttrain.evaluation.report import Report
    from posttrain.evaluation.runs import last_report

    reports = [each if isinstance(each, Report) else Report.load(last_report(Path(each))) for each in (base, other)]
    return compare_reports(*reports)


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder as plain records.

    Attributes:
        folder: of the run.
        recipe: with its defaults.
        environment: packages, machine and commit that it ran with.
        data: how many rows were kept, cut and dropped.
        metrics: one dictionary per logged step: `step`, `time` (Unix seconds), metrics by name.
        alarms: `step`, `alarm`, `metric`, `value`, `text`.
        samples: what `samples.jsonl` holds; empty where the method samples nothing.
        tokens: what `tokens.jsonl` holds: single sequences with the values of their tokens.
        evaluations: step -> report, as plain data.
        model: folder of the trained model; None while there is none.
    """

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    metrics: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    model: Path | None

    def to_pandas(self) -> pandas.DataFrame:
        """Metrics as a table, one row per step; several entries of a step are joined."""
        import pandas

        steps: dict[int, dict[str, Any]] = {}
        for row in self.metrics:
            steps.setdefault(row["step"], {}).update(row)
        return pandas.DataFrame(list(steps.values())).set_index("step").sort_index()


def load_run(folder: str | Path) -> Run:
    """Read a run folder, also one that is still being written.

    Raises:
        DataError: there is no run, a file of it cannot be read, or a link leads out of it.
    """
    path = Path(folder)
    refuse_links_out(path)
    events = read_events(path / FILE_NAME)
    samples, tokens = path / "samples.jsonl", path / "tokens.jsonl"
    evaluations = [file for file in sorted((path / "evaluation").glob("step-*.json")) if file.stem[5:].isdecimal()]
    return Run(
        folder=path,
        recipe=_recipe_of(path / "resolved.yaml"),
        environment=_whole_file(path / "environment.json"),
        data=_whole_file(path / "data.json"),
        metrics=[{"step": e["step"], "time": e["time"], **metrics_of(e)} for e in events if "alarm" not in e],
        alarms=[event for event in events if "alarm" in event],
        samples=_whole_lines(samples) if samples.is_file() else [],
        tokens=_whole_lines(tokens) if tokens.is_file() else [],
        evaluations={int(file.stem.removeprefix("step-")): _whole_file(file) for file in evaluations},
        model=path / "model" if (path / "model").is_dir() else None,
    )


def _whole_file(path: Path) -> dict[str, Any]:
    """A file of a JSON object; empty without it."""
    found = read_json(path, most=MAX_REPORT) if path.is_file() else {}
    if not isinstance(found, dict):
        raise DataError("not a JSON object", where=str(path))
    return found


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; an unfinished last line is left out."""
    rows = []
    for line, where in whole_lines(path):
        rows.append(parse_json(line, where))
        if not isinstance(rows[-1], dict):
            raise DataError("not a JSON object", where=where)
    return rows


def _recipe_of(path: Path) -> dict[str, Any]:
    """What stands in `resolved.yaml`; empty without it."""
    found = read_file(path)[0] if path.is_file() else {}
    for name in ("model", "data", "method", "batch", "training", "rollouts", "evaluation"):
        if not isinstance(found.get(name), dict | None):
            raise DataError(f"not the recipe of a run: `{name}` is no section", where=str(path))
    return found


def _section(config: Source | None, name: str) -> tuple[dict[str, Any], Locations]:
    if config is None:
        return {}, Locations(name)
    if isinstance(config, Mapping):
        return dict(config), Locations(name)
    return read_file(config)


def _texts(overrides: Overrides) -> list[str]:
    """Overrides as the command line has them; JSON is YAML."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return list(overrides or ())
