"""The study file: arms, seeds, settings to tune, a budget, a measure, and when an arm has lost. Without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.locations import Locations, raise_all
from posttrain.config.overrides import apply_overrides
from posttrain.config.schema import Section
from posttrain.config.validation import Context, validate
from posttrain.config.workers import EvaluationRun
from posttrain.config.yaml_file import read_file
from posttrain.evaluation.sequential import SequentialPlan, first_useful_look
from posttrain.pipeline.schema import PlayStageConfig
from posttrain.tracking.ledger import UNITS

Setting = dict[str, Any]
"""Dotted key -> value."""

OF_AN_ARM = ("measure", "greedy", "samples", "temperature", "top_p", "k", "maj", "beams", "value")
"""Keys of `evaluate` that an arm may have of its own: they say how answers are made, not what is asked."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
TUNING = 10_000
"""First of the tuning seeds where only their number is given: apart from the reported ones, which count from 0."""


class ArmConfig(Section):
    """One method under study: a recipe, a pipeline file, or stages written in place."""

    recipe: str | None = Field(None, description="recipe file, from the folder of the study")
    pipeline: str | None = Field(None, description="pipeline file, from the folder of the study")
    stages: list[dict[str, Any]] | None = Field(None, min_length=1, description="stages, as in a pipeline file")
    model: str | None = Field(None, description="train stage whose model is measured; default: the last one")
    set: Setting = Field(
        default_factory=dict,
        description="dotted overrides of the recipe; `stage.key` for another stage than the measured one",
    )
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="dotted key -> values to tune over")
    evaluate: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of `evaluate` that are other for this arm: how answers are made (a search by its own value "
        "model, more samples), and the measure",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ArmConfig:
        given = [name for name in ("recipe", "pipeline", "stages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"an arm needs exactly one of recipe, pipeline, stages; it has {', '.join(given) or 'none'}"
            )
        if self.model is not None and self.recipe is not None:
            raise ValueError("`model` has no effect with a recipe, which trains one model")
        return self


class BudgetConfig(Section):
    """What every arm may spend, in one unit. The number of steps of the measured stage follows from a probe."""

    flops: float | None = Field(None, gt=0, description="as the ledger counts them (docs/metrics.md)")
    tokens: float | None = Field(None, gt=0, description="read, sampled, trained on and scored, each pass counted")
    environment_steps: float | None = Field(
        None, gt=0, description="actions that environments answered; arms whose training takes none train as written"
    )
    seconds: float | None = Field(None, gt=0, description="of GPUs, else of the CPU; not the same in a second run")
    traces: Literal["charged", "sunk"] = Field(
        "charged", description="whether an arm pays for traces that it did not sample itself, or they were there anyway"
    )
    probe: int = Field(3, ge=1, description="steps of a short run that says what one step takes; not charged")

    @property
    def unit(self) -> str:
        """The one that is given."""
        return next(name for name in UNITS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """In that unit."""
        return float(getattr(self, self.unit))

    @model_validator(mode="after")
    def _one_unit(self) -> BudgetConfig:
        given = [name for name in UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget needs exactly one of {', '.join(UNITS)}; it has {', '.join(given) or 'none'}")
        if self.unit == "seconds" and self.traces == "charged" and "traces" in self.model_fields_set:
            raise ValueError("traces do not say how many seconds they took: charge them by `flops` or `tokens`")
        return self


class SequentialConfig(Section):
    """AdaStop's test between groups of seeds; see docs/statistics.md."""

    seeds_per_look: int = Field(3, ge=1, description="seeds of each arm between two looks")
    looks: int = Field(5, ge=1, description="looks at most")
    alpha: float = Field(0.05, gt=0, lt=1, description="probability of any false difference, over all pairs and looks")
    stop: Literal["losers", "decided"] = Field(
        "losers", description="an arm gets no more seeds once another is better; or once all its pairs are decided"
    )

    @property
    def plan(self) -> SequentialPlan:
        """As the test takes it."""
        return SequentialPlan(self.seeds_per_look, self.looks, self.alpha, drop_losers=self.stop == "losers")

    @model_validator(mode="after")
    def _can_decide(self) -> SequentialConfig:
        if first_useful_look(self.plan) is None:
            raise ValueError(
                f"{self.looks} looks at {self.seeds_per_look} seeds can never tell arms apart at alpha {self.alpha:g}: "
                "raise seeds_per_look or looks"
            )
        return self


class StudyPlay(PlayStageConfig):
    """Episodes that every model plays; the other keys are those of a play stage."""

    set: dict[str, Any] = Field(default_factory=dict, description="dotted overrides of the recipe")


class StudyEvaluation(EvaluationRun):
    """What every model is measured on; the other keys are those of a recipe's `evaluation` section."""

    play: StudyPlay | None = Field(
        None, description="episodes that every model plays, in the place of benchmarks; `measure: avg@1`"
    )
    measure: str = Field(
        "greedy", description="greedy, avg@n, pass@k, maj@k or beam@width; an arm's score is its mean over benchmarks"
    )
    beside: list[str] = Field(
        default_factory=list,
        description="benchmarks that are no part of the score and stand in the table beside it, e.g. old skills",
    )
    points: int | None = Field(
        None, ge=1, description="also measure this often while training, for curves over compute"
    )

    @model_validator(mode="after")
    def _something_to_measure(self) -> StudyEvaluation:
        if self.play is None and not self.benchmarks:
            raise ValueError("there is nothing to measure: give `benchmarks`, or `play` where arms act in environments")
        if self.play is None:
            return self
        read = {"play", "measure"}
        if idle := sorted(self.model_fields_set - read):
            raise ValueError(f"{', '.join(idle)}: no effect beside `play`, whose recipe says how episodes are played")
        return self

    @model_validator(mode="after")
    def _is_measured(self) -> StudyEvaluation:
        if self.play is not None:
            known = [f"avg@{self.play.samples}", "pass@1"]
            if self.measure not in known:
                raise ValueError(f"no measure {self.measure!r} of episodes: {', '.join(known)}")
            return self
        for key in ("every", "best", "preferences", "episodes"):
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` has no effect in a study: every model is measured at its end (`points`)")
        known = [*(["greedy"] if self.greedy else []), f"avg@{self.samples}"]
        known += [*(f"pass@{k}" for k in self.k), *(f"maj@{k}" for k in self.maj)]
        known += [f"beam@{self.beams}"] * (self.beams is not None)
        if self.measure not in known:
            raise ValueError(f"no measure {self.measure!r} with these keys, which give {', '.join(known)}")
        names = [each if isinstance(each, str) else each.name for each in self.benchmarks]
        if unknown := [name for name in self.beside if name not in names]:
            raise ValueError(f"`beside` names no benchmark of these: {unknown[0]!r}; {', '.join(names)}")
        if names and set(names) <= set(self.beside):
            raise ValueError("all benchmarks stand in `beside`, so nothing makes up the score")
        return self


class StudyConfig(Section):
    """A study."""

    study: str = Field(description="its name")
    output: str = Field(description="folder of everything that it makes")
    arms: dict[str, str | ArmConfig] = Field(min_length=1, description="name -> recipe file, or a section")
    seeds: int | list[int] | None = Field(None, description="number, from 0, or a list; default: what the looks need")
    tuning_seeds: int | list[int] | None = Field(None, description="the same for tuning, apart from the reported ones")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="of all arms that have no `grid` of their own")
    shared: list[dict[str, Any]] = Field(
        default_factory=list, description="stages made once per seed for all arms, e.g. a base and its traces"
    )
    evaluate: StudyEvaluation = Field(description="what is measured")
    budget: BudgetConfig | None = Field(None, description="equal compute; default: every arm as its recipe says")
    sequential: SequentialConfig | None = Field(None, description="default: all arms get all seeds, and one look")
    baseline: str | None = Field(None, description="arm that the others are paired with; default: the best one")
    tolerance: float = Field(0.1, ge=0, description="compute counts as equal if the largest is at most this much more")

    @field_validator("arms")
    @classmethod
    def _sections(cls, arms: dict[str, str | ArmConfig]) -> dict[str, str | ArmConfig]:
        for name in arms:
            if not NAME.fullmatch(name):
                raise ValueError(f"arm {name!r}: letters, digits and _ . + = - only, as it names a folder")
        return {name: ArmConfig(recipe=arm) if isinstance(arm, str) else arm for name, arm in arms.items()}

    @model_validator(mode="after")
    def _together(self) -> StudyConfig:
        for name in self.arms:
            self.evaluation(name)  # raises
        tuned = [name for name in self.arms if len(self.settings(name)) > 1]
        if tuned and not self.tuning:
            raise ValueError(f"arm {tuned[0]!r} has a grid: give `tuning_seeds`, apart from the reported ones")
        if self.tuning and not tuned:
            raise ValueError("`tuning_seeds` have no effect without a `grid`")
        both = set(self.tuning) & set(self.reported)
        if both:
            raise ValueError(f"seed {min(both)} is reported and tuned on: what was tuned on it looks better than it is")
        for seeds in (self.tuning, self.reported):
            if len(set(seeds)) < len(seeds):
                raise ValueError("a seed is given twice")
        if not self.reported:
            raise ValueError("give `seeds`, or `sequential`, which says how many are needed")
        if self.sequential is not None and len(self.reported) < self.sequential.plan.seeds:
            raise ValueError(
                f"{self.sequential.looks} looks at {self.sequential.seeds_per_look} seeds need "
                f"{self.sequential.plan.seeds} seeds, got {len(self.reported)}"
            )
        if self.sequential is not None and len(self.arms) < 2:
            raise ValueError("a sequential test needs two arms")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"no arm {self.baseline!r} for a baseline: one of {', '.join(self.arms)}")
        return self

    @property
    def reported(self) -> list[int]:
        """Seeds that the table is of, in their order."""
        if self.seeds is None and self.sequential is not None:
            return list(range(self.sequential.plan.seeds))
        return _seeds(self.seeds, 0)

    @property
    def tuning(self) -> list[int]:
        """Seeds that settings are chosen on."""
        return _seeds(self.tuning_seeds, TUNING)

    def arm(self, name: str) -> ArmConfig:
        """A section, also where only a file is named."""
        arm = self.arms[name]
        assert isinstance(arm, ArmConfig)  # made so when the file was read
        return arm

    def evaluation(self, name: str) -> StudyEvaluation:
        """How an arm is measured: as all are, but for its own keys.

        Raises:
            ValueError: its own keys would measure something else than others are measured on, or cannot be.
        """
        own = self.arm(name).evaluate
        if other := sorted(set(own) - set(OF_AN_ARM)):
            raise ValueError(
                f"arm {name!r}: `evaluate.{other[0]}` is the same for all arms: its own can be {', '.join(OF_AN_ARM)}"
            )
        if own and (self.evaluate.points is not None or self.evaluate.play is not None):
            raise ValueError(
                f"arm {name!r}: an `evaluate` of its own has no effect on `points` and `play`: leave them out"
            )
        return (
            StudyEvaluation.model_validate({**self.evaluate.model_dump(exclude_unset=True), **own})
            if own
            else self.evaluate
        )

    def settings(self, name: str) -> list[Setting]:
        """All combinations of an arm's grid, in the order written; one empty setting without a grid."""
        grid = self.arm(name).grid or self.grid
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


@dataclass(frozen=True, slots=True)
class Study:
    """A study file that has been read: the file, its values, and the lines they stand in."""

    file: Path
    config: StudyConfig
    locations: Locations

    @property
    def output(self) -> Path:
        """The study's folder."""
        return Path(self.config.output)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """A study from its file and dotted overrides.

    Raises:
        RecipeError: a key or value that cannot be, with file and line.
    """
    data, locations = read_file(path)
    apply_overrides(data, locations, overrides)
    return build_study(path, data, locations)


def build_study(path: Path, data: dict[str, Any], locations: Locations) -> Study:
    """A study from plain data; `path` is the file that relative files are taken from."""
    config, errors = validate(StudyConfig, data, Context(locations, StudyConfig))
    raise_all(errors)
    assert config is not None  # without errors there is one
    return Study(path, config, locations)


def _seeds(seeds: int | list[int] | None, first: int) -> list[int]:
    return list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds or [])
