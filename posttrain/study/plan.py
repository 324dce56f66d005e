"""From a study to its cells: the stages that (arm, setting, seed) stands for, their keys, and what their traces cost.

A cell is written down twice. With the shared stages in front it is one pipeline, which `check_stages` checks whole and
whose keys are the cell's. To be run, the shared stages are cells of their own, one per seed, and a reference to them is
a path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from posttrain.config.locations import Locations
from posttrain.config.trust import Trusted
from posttrain.config.yaml_file import read_file
from posttrain.data.traces import manifest_path, read_traces
from posttrain.errors import PosttrainError, RecipeError, RecipeErrors
from posttrain.pipeline.cache import key_of
from posttrain.pipeline.inputs import input_paths
from posttrain.pipeline.runner import check_stages, stages_of, trusted_by
from posttrain.pipeline.schema import REFERENCE, apply_at, build_pipeline, references, substitute
from posttrain.pipeline.stages import STAGES, Stage, as_written
from posttrain.safe_files import refuse_links_below
from posttrain.study.schema import ArmConfig, Setting, Study

Part = Literal["shared", "tuning", "reported"]
SHARED = "shared"
"""What the folder of shared stages is called, and so no arm."""
_SEED = "${seed}"


@dataclass(frozen=True, slots=True)
class CellRequest:
    """What the process of a cell is told; JSON values.

    Attributes:
        key: of all that the result depends on.
        file: that recipes and code are named from.
        output: the cell's folder.
        stages: as in a pipeline file, references to shared stages replaced by paths.
        measured: train stage whose model is measured; None for shared stages.
        evaluation: the eval stage.
        measure: as in `StudyEvaluation`.
        beside: as there.
        evaluate: the `evaluation` section of a training run; None without points.
        points: of the curve.
        budget: as in `BudgetConfig`; None without one.
        bought: trace files whose sampling is charged.
    """

    key: str
    file: str
    output: str
    stages: list[dict[str, Any]]
    measured: str | None = None
    evaluation: str = ""
    measure: str = ""
    beside: list[str] = field(default_factory=list)
    evaluate: dict[str, Any] | None = None
    points: int | None = None
    budget: dict[str, Any] | None = None
    bought: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study.

    Attributes:
        part: whether it is reported, tuned on, or made for others.
        arm: its name.
        setting: of the arm's grid.
        seed: of training and sampling.
        request: what is run.
        needs: the shared stages of the seed; None if it reads none.
    """

    part: Part
    arm: str
    setting: Setting
    seed: int
    request: CellRequest
    needs: Cell | None = None

    @property
    def folder(self) -> Path:
        """Where all of it is."""
        return Path(self.request.output)

    @property
    def name(self) -> str:
        """For people."""
        setting = f" {in_words(self.setting)}" if self.setting else ""
        return f"{self.arm}{setting} seed {self.seed}"


def in_words(setting: Setting) -> str:
    """`learning_rate=0.001, beta=0.1`: the last part of each key, or the whole where two end alike."""
    short = [key.rpartition(".")[2] for key in setting]
    names = short if len(set(short)) == len(short) else list(setting)
    return ", ".join(f"{name}={value}" for name, value in zip(names, setting.values(), strict=True))


def trusted_by_study(study: Study, *, run_code: bool = False) -> list[Trusted]:
    """What a run of a study has one trust, with arm and stage before each key.

    Arms that cannot be read are left out: `check_study` says what is wrong with them.
    """
    found: dict[Trusted, None] = {}
    for arm in study.config.arms:
        for setting in study.config.settings(arm):
            try:
                stages = _Written(study, arm, setting, study.config.reported[0], run_code=run_code).stages
                found |= {replace(each, key=f"{arm}: {each.key}"): None for each in trusted_by(stages)}
            except PosttrainError:
                continue
    return list(found)


def check_study(study: Study, *, run_code: bool = True) -> None:
    """Check every arm in every setting as its training would, before anything runs.

    Args:
        study: as read.
        run_code: load plugins and code of models, without which less is checked.

    Raises:
        PosttrainError: the first problem of each arm; of arms that share it once.
        StateError: a link leads out of the output folder, and cells would be written there.
    """
    refuse_links_below(study.output)
    found: dict[str, PosttrainError] = {}
    for arm in study.config.arms:
        for setting in study.config.settings(arm):
            try:
                _refuse(_Written(study, arm, setting, study.config.reported[0], run_code=run_code))
            except RecipeErrors as several:
                found |= {str(error): error for error in several.errors}
            except PosttrainError as error:
                found.setdefault(str(error), error)
    errors = list(found.values())
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RecipeErrors(errors)


def cell_of(study: Study, part: Part, arm: str, setting: Setting, seed: int) -> Cell:
    """A cell whose study has been checked."""
    written = _Written(study, arm, setting, seed)
    folder = study.output / part / arm / _folder_name(setting) / f"seed-{seed}"
    if part == "reported":  # one setting of each arm is
        folder = study.output / part / arm / f"seed-{seed}"
    needs = _shared(study, written, seed)
    return Cell(part, arm, setting, seed, written.request(folder, needs), needs)


def _shared(study: Study, written: _Written, seed: int) -> Cell | None:
    """The shared stages that an arm reads, with all before them; None if it reads none."""
    used = [number for number, stage in enumerate(written.stages[: written.shared]) if stage.name in written.reached]
    if not used:
        return None
    number = len(study.config.shared)
    stages = written.data["stages"][:number]
    folder = study.output / SHARED / f"seed-{seed}"
    key = key_of({"keys": [written.keys[stage.name] for stage in written.stages[:number]]})
    return Cell("shared", SHARED, {}, seed, CellRequest(key, str(study.file), str(folder), stages))


class _Written:
    """A cell as one pipeline, shared stages first."""

    def __init__(self, study: Study, arm: str, setting: Setting, seed: int, *, run_code: bool = True) -> None:
        self.study, self.arm, self.seed = study, arm, seed
        config, self.evaluate = study.config.arm(arm), study.config.evaluation(arm)
        self.file = study.file if config.pipeline is None else study.file.parent / config.pipeline
        self.data: dict[str, Any] = {"pipeline": arm, "output": str(study.output / "check" / arm), "stages": []}
        self.locations = Locations(str(study.file))
        self._add(deepcopy(study.config.shared), study.locations, ("shared",), study.file)
        self.shared = len(study.config.shared)
        self._add(*self._of_arm(config))
        self.measured = self._measured(config)
        del self.data["stages"][self.measured + 1 :]
        for key, value in {**config.set, **setting}.items():
            self._set(key, value, self._place(key))
        self._seed_all()
        self._add_evaluation()
        pipeline = build_pipeline(self.data, self.locations, STAGES)
        self.stages = stages_of(pipeline, self.locations, self.file, run_code=run_code)
        self.reached = self._reached()

    @cached_property
    def keys(self) -> dict[str, str]:
        """Stage -> the key that a pipeline would give it."""
        keys: dict[str, str] = {}
        for stage in self.stages:
            keys[stage.name] = key_of(stage.inputs(lambda name, artefact: f"{as_written(name, artefact)}@{keys[name]}"))
        return keys

    def request(self, folder: Path, needs: Cell | None) -> CellRequest:
        """What a process that runs the cell is told."""
        config, shared = self.study.config, {} if needs is None else {s.name: s for s in self.stages[: self.shared]}

        def place(stage: str, artefact: str) -> str:
            if stage not in shared or needs is None:
                return as_written(stage, artefact)
            return str(needs.folder / stage / shared[stage].artefacts[artefact])

        budget = None if config.budget is None else config.budget.model_dump()
        curve = self.evaluate.points and {"points": self.evaluate.points}
        how = {"measure": self.evaluate.measure, "beside": self.evaluate.beside, "budget": budget, "curve": curve}
        key = key_of({"keys": self.keys[self.stages[-1].name], **how})
        return CellRequest(
            key=key,
            file=str(self.file),
            output=str(folder),
            stages=[substitute(stage, place) for stage in self.data["stages"][self.shared :]],
            measured=self.stages[self.measured].name,
            evaluation=self.stages[-1].name,
            measure=self.evaluate.measure,
            beside=self.evaluate.beside,
            evaluate=substitute(self._while_training(), place),
            points=self.evaluate.points,
            budget=budget,
            bought=self.bought(folder, needs, all_of_them=config.budget is None or config.budget.traces == "charged"),
        )

    def bought(self, folder: Path, needs: Cell | None, *, all_of_them: bool) -> list[str]:
        """Trace files that the measured model stands on and that are charged.

        Those that the arm samples itself always are; those of shared stages, and those that were there, are if asked.
        """
        found: dict[str, None] = {}
        for number, stage in enumerate(self.stages[:-1]):
            own = number >= self.shared
            if stage.name not in self.reached or not (own or all_of_them):
                continue
            if stage.entry.kind in ("sample", "play"):
                root = folder if own or needs is None else needs.folder
                found[str(root / stage.name / stage.artefacts["traces"])] = None
            if all_of_them:
                found |= dict.fromkeys(traces_read(stage.resolved(as_written)))
        return list(found)

    def _of_arm(self, config: ArmConfig) -> tuple[list[dict[str, Any]], Locations, tuple[str | int, ...], Path]:
        at = ("arms", self.arm)
        if config.stages is not None:
            return deepcopy(config.stages), self.study.locations, (*at, "stages"), self.study.file
        if config.pipeline is not None:
            data, locations = read_file(self.file)
            build_pipeline(data, locations, STAGES)  # says what is wrong with the file before it is added to
            return data["stages"], locations, ("stages",), self.file
        key = "recipe" if (*at, "recipe") in self.study.locations.places else None
        where = self.study.locations.place(at if key is None else (*at, key))
        return [{"name": "train", "train": config.recipe}], Locations(where), (), self.study.file

    def _add(self, stages: list[dict[str, Any]], locations: Locations, at: tuple[str | int, ...], file: Path) -> None:
        first = len(self.data["stages"])
        for path, place in locations.places.items():
            if path[: len(at)] == at and len(path) > len(at) and isinstance(path[len(at)], int):
                number = path[len(at)]
                assert isinstance(number, int)
                self.locations.places["stages", first + number, *path[len(at) + 1 :]] = place
        for number, stage in enumerate(stages):
            self.locations.places.setdefault(("stages", first + number), locations.place((*at, number)))
            # Which a cell, whose folder is elsewhere, must still find.
            if isinstance(stage.get("train"), str):
                stage["train"] = os.path.abspath(file.parent / stage["train"])
            if isinstance(stage.get("play"), dict) and isinstance(stage["play"].get("recipe"), str):
                stage["play"]["recipe"] = os.path.abspath(file.parent / stage["play"]["recipe"])
            self.data["stages"].append(_seeded(stage, self.seed))

    def _measured(self, config: ArmConfig) -> int:
        trained = {
            stage.get("name"): number
            for number, stage in enumerate(self.data["stages"])
            if "train" in stage and number >= self.shared
        }
        if not trained:
            where = self.study.locations.place(("arms", self.arm))
            raise RecipeError(f"arm {self.arm!r} trains nothing", where=where, hint="give it a `train` stage")
        if config.model is None:
            return list(trained.values())[-1]
        if config.model not in trained:
            where = self.study.locations.where(("arms", self.arm, "model"))
            raise RecipeError(f"no train stage {config.model!r}", where=where, hint=f"one of {', '.join(trained)}")
        return trained[config.model]

    def _place(self, key: str) -> str:
        for path in (("arms", self.arm, "set", key), ("arms", self.arm, "grid", key), ("grid", key)):
            if path in self.study.locations.places:
                return self.study.locations.places[path]
        return self.study.locations.place(("arms", self.arm))

    def _set(self, key: str, value: Any, place: str) -> None:
        numbers = {self.data["stages"][n].get("name"): n for n in range(self.shared, self.measured + 1)}
        head, _, rest = key.partition(".")
        number, inner = (numbers[head], rest) if head in numbers and rest else (self.measured, key)
        stage = self.data["stages"][number]
        kind = next((name for name in STAGES if name in stage), "")
        if inner in ("seed", "output"):
            hint = "give `seeds`" if inner == "seed" else "give `output` of the study"
            raise RecipeError(f"`{inner}` is set by the study", where=f"{place}: {key}", hint=hint)
        value = _seeded(value, self.seed)
        if STAGES[kind].takes_set:
            stage["set"] = {**(stage.get("set") or {}), inner: value}
            self.locations.replace(("stages", number, "set", inner), place, Locations(place))
        else:
            text = json.dumps(value, ensure_ascii=False)
            apply_at(self.data, self.locations, f"stages.{number}.{kind}.{inner}={text}", place)

    def _seed_all(self) -> None:
        for stage in self.data["stages"]:
            if "train" in stage or "play" in stage:
                stage["set"] = {**(stage.get("set") or {}), "seed": self.seed}
            elif isinstance(stage.get("sample"), dict):
                stage["sample"]["seed"] = self.seed

    def _add_evaluation(self) -> None:
        names = {stage.get("name") for stage in self.data["stages"]}
        name = next(name for name in ("eval", "study_eval", "measured_by_the_study") if name not in names)
        model = f"${{{self.data['stages'][self.measured].get('name')}.model}}"
        place = self.study.locations.place(("evaluate",))
        number = len(self.data["stages"])
        self.locations.places["stages", number] = place
        for path, line in self.study.locations.places.items():
            if path[0] == "evaluate":
                self.locations.places["stages", number, *self._below(path[1:])] = line
        if self.evaluate.play is None:
            stage = {"name": name, "eval": {"model": {"path": model}, **self._evaluation()}}
        else:
            play = self.evaluate.play.model_dump(exclude_unset=True)
            if isinstance(play["recipe"], str):
                play["recipe"] = os.path.abspath(self.study.file.parent / play["recipe"])
            stage = {"name": name, "set": {**play.pop("set", {}), "model.path": model}, "play": play}
        self.data["stages"].append(stage)

    def _below(self, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Where a key of `evaluate` stands within the stage."""
        return path if self.evaluate.play is not None else ("eval", *path)

    def _evaluation(self) -> dict[str, Any]:
        """As written, less what only a study knows."""
        return self.evaluate.model_dump(
            exclude_unset=True, exclude={"measure", "beside", "points", "play"}, mode="json"
        )

    def _while_training(self) -> dict[str, Any] | None:
        if self.evaluate.points is None:
            return None
        alone = ("workers", "address", "engine", "vllm")
        return {key: value for key, value in self._evaluation().items() if key not in alone}

    def _reached(self) -> set[str]:
        """Names of the stages that the measured model stands on, itself included."""
        by_name = {stage.name: stage for stage in self.stages}
        found, left = set(), [self.stages[self.measured].name]
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += [other for other, _ in references(by_name[name].entry)]
        return found


def _refuse(written: _Written) -> None:
    check_stages(written.stages)
    study, measured = written.study, written.stages[written.measured]
    recipe: Any = measured.resolved(as_written)
    place = study.locations.place(("arms", written.arm))
    if study.config.budget is None:
        if written.evaluate.points is not None and recipe.training.max_steps is None:
            raise RecipeError(
                f"arm {written.arm!r} gives no `training.max_steps`, so `points` cannot be spread over its run",
                where=study.locations.where(("evaluate", "points")),
                hint="set it, or give a `budget`",
            )
        return
    if study.config.budget.traces == "charged" and study.config.budget.unit != "seconds":
        for path in _here(written.stages, written.reached):
            if not any(trace.flops for trace in read_traces([path]).traces):
                raise RecipeError(
                    f"arm {written.arm!r} would be charged for the traces, which do not say what they cost",
                    where=f"{place}: {path}",
                    hint="`budget.traces: sunk` compares what the arms make of traces that are there",
                )


def _here(stages: Sequence[Stage], reached: set[str]) -> Iterator[str]:
    for stage in stages:
        if stage.name in reached:
            yield from traces_read(stage.resolved(as_written))


def traces_read(config: Any) -> Iterator[str]:
    """Trace files that a resolved config reads and that are there already."""
    for path in input_paths(config):
        if not REFERENCE.search(path) and path.endswith((".jsonl", ".parquet")) and manifest_path(Path(path)).exists():
            yield path


def _seeded(value: Any, seed: int) -> Any:
    """`value` with `${seed}` in its strings replaced; a string that is nothing else becomes the number."""
    if isinstance(value, str):
        return seed if value == _SEED else value.replace(_SEED, str(seed))
    if isinstance(value, Mapping):
        return {key: _seeded(item, seed) for key, item in value.items()}
    if isinstance(value, list):
        return [_seeded(item, seed) for item in value]
    return value


def _folder_name(setting: Setting) -> str:
    name = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", in_words(setting).replace(", ", ",")) or "as-written"
    return name if len(name) <= 100 else key_of(setting)[:16]
