"""The kinds of stage. A new kind is one class here and one line in STAGES.

A kind turns its part of the pipeline file into a config with all references replaced (`resolved`), says what can be
known to be wrong with it before anything runs (`check`), and does the work (`run`).
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, SerializeAsAny
from rich.console import Console

from posttrain.config.collection import SampleSettings
from posttrain.config.loading import build_recipe
from posttrain.config.locations import Locations, dotted, raise_all
from posttrain.config.schema import FileSource, ModelConfig, Recipe
from posttrain.config.trust import Trusted, trusted
from posttrain.config.yaml_file import read_file
from posttrain.data.episodes import write_episodes
from posttrain.data.traces import manifest_path, read_manifest
from posttrain.errors import NeedsError, RecipeError
from posttrain.pipeline.inputs import check_benchmarks, check_model, check_source
from posttrain.pipeline.safety_stages import AttacksStage, RefusalsStage, SafetyStage
from posttrain.pipeline.schema import (
    REFERENCE,
    CompareStageConfig,
    CompletionsStageConfig,
    EvalStageConfig,
    ExtrapolateStageConfig,
    PairsStageConfig,
    PlayStageConfig,
    ResponsesStageConfig,
    apply_at,
    strings,
    substitute,
)
from posttrain.pipeline.stage import Resolve, Stage, as_written
from posttrain.safe_files import folder_atomic, write_json_atomic, write_text_atomic
from posttrain.state.checkpoint import complete_checkpoints
from posttrain.terminal import say

if TYPE_CHECKING:
    from posttrain.evaluation.compare import Comparison

SPENT = "spent.json"
"""In the folder of a play stage: what it took, by the names of `tracking.ledger.AMOUNTS`."""


class _RecipeStage(Stage):
    """A stage with a recipe, in a file or in place, and overrides of it."""

    takes_set = True
    at: ClassVar[tuple[str | int, ...]] = ()
    """Where the recipe stands below the kind's key."""

    @property
    @abstractmethod
    def recipe(self) -> Any:
        """Its file, or the recipe in place."""

    def trusted(self) -> list[Trusted]:
        recipe, locations = self._recipe(as_written)
        return trusted(recipe, Path(locations.file).parent)

    def _recipe(self, resolve: Resolve) -> tuple[Recipe, Locations]:
        from posttrain.methods import CONFIGS

        data, locations = self._from_file() if isinstance(self.recipe, str) else self._inline(resolve)
        errors = []
        for key, value in self.entry.set.items():
            place = self.locations.place(("stages", self.number, "set", key))
            if key.split(".")[0] == "output":
                errors.append(_output_is_set(f"{place}: {key}"))
                continue
            text = json.dumps(substitute(value, resolve), ensure_ascii=False)
            try:
                apply_at(data, locations, f"{key}={text}", place)
            except RecipeError as error:
                errors.append(error)
        raise_all(errors)
        data["output"] = str(self.folder)
        return build_recipe(data, locations, CONFIGS, run_plugins=self.run_code), locations

    def _from_file(self) -> tuple[dict[str, Any], Locations]:
        path = self.file.parent / self.recipe
        data, locations = read_file(path)
        raise_all(
            [
                RecipeError(
                    f"{text!r}: references are read in the pipeline file, not in a recipe",
                    where=locations.where(at),
                    hint=f"write it there, under `set` of stage {self.name!r}: {{{dotted(at)}: ...}}",
                )
                for at, text in strings(data)
                if REFERENCE.search(text)
            ]
        )
        return data, locations

    def _inline(self, resolve: Resolve) -> tuple[dict[str, Any], Locations]:
        base = ("stages", self.number, self.entry.kind, *self.at)
        n = len(base)
        places = {path[n:]: place for path, place in self.locations.places.items() if path[:n] == base and path[n:]}
        if "output" in self.recipe:
            raise _output_is_set(places[("output",)])
        return substitute(deepcopy(self.recipe), resolve), Locations(self.locations.place(base), places)


class TrainStage(_RecipeStage):
    """A training run; the stage folder is the run folder."""

    Config = str | dict[str, Any]
    artefacts = {"model": "model", "run": "."}
    expects = {"model.path": "model", "data.traces.path": "traces"}
    packages = ("torch", "transformers", "trl")
    without_effect = ("output", "tracking", "training.report_to", "training.run_name")

    @property
    def recipe(self) -> Any:
        return self.entry.config

    def resolved(self, resolve: Resolve) -> Recipe:
        return self._recipe(resolve)[0]

    def check(self, earlier: Mapping[str, Stage]) -> None:
        from posttrain.config.preflight import plan_batch
        from posttrain.methods import METHODS
        from posttrain.trainers.rows import refuse

        recipe, locations = self._recipe(as_written)
        method = METHODS[recipe.method.name](recipe.method)
        refuse(recipe, method, locations)
        for section in method.needs.data:
            if method.needs.traces_instead and recipe.data.traces is not None:
                section = "traces"
            source = getattr(recipe.data, section)
            if section != "traces":
                rows = None if isinstance(source, FileSource | list) else source.size
                plan_batch(recipe, method.needs, world_size=1, rows=rows, locations=locations)
            check_source(source, section, reads=section)
        if recipe.evaluation is not None:
            check_benchmarks(recipe.evaluation)
        check_model(recipe.model, self.run_code)

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.trainers.run import train

        result = train(self.resolved(resolve), resume="auto" if interrupted else None)
        if result.stopped:
            raise KeyboardInterrupt(result.signal)

    def can_continue(self) -> bool:
        return bool(complete_checkpoints(self.folder / "checkpoints"))

    def next_steps(self) -> list[tuple[str, str]]:
        model, curves = self.folder / "model", self.folder / "plots" / "curves.png"
        steps = [("model", str(model)), ("metrics", str(self.folder / "metrics.jsonl"))]
        steps += [("curves", str(curves))] if curves.exists() else []
        return [*steps, ("evaluate it", f"posttrain eval {model} --benchmarks NAME")]


class PlaySettings(BaseModel):
    """What a play stage does, with the whole recipe."""

    recipe: SerializeAsAny[Recipe]
    episodes: int
    samples: int
    agent: str


class PlayStage(_RecipeStage):
    """Episodes of a model or an agent: data for other stages, and a report of how many were solved."""

    Config = PlayStageConfig
    artefacts = {"traces": "episodes.jsonl", "report": "report.json"}
    packages = ("torch", "transformers")
    without_effect = ("recipe.output", "recipe.tracking", "recipe.training")
    at = ("recipe",)

    @property
    def recipe(self) -> Any:
        return self.entry.config.recipe

    def resolved(self, resolve: Resolve) -> PlaySettings:
        config = self.entry.config
        how = {"episodes": config.episodes, "samples": config.samples, "agent": config.agent}
        return PlaySettings.model_construct(recipe=self._recipe(resolve)[0], **how)

    def check(self, earlier: Mapping[str, Stage]) -> None:
        from posttrain.methods import METHODS
        from posttrain.trainers.rows import refuse

        recipe, locations = self._recipe(as_written)
        if recipe.environment is None:
            raise NeedsError("the recipe has no environment to play in", where=self.place, hint="add `environment`")
        refuse(recipe, METHODS[recipe.method.name](recipe.method), locations)
        source: Any = recipe.data.prompts
        check_source(source, "prompts")
        config = self.entry.config
        if not isinstance(source, FileSource | list) and source.size < config.episodes:
            raise RecipeError(
                f"{config.episodes} problems are to be played, and there are {source.size}",
                where=locations.where(("data", "prompts", "size")),
                hint="raise it, or play fewer `episodes`",
            )
        if config.agent == "policy":
            check_model(recipe.model, self.run_code)
        else:
            from posttrain.evaluation.episodes import agent_of

            agent_of(recipe, config.agent)

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.evaluation.episode_report import episode_report
        from posttrain.evaluation.episodes import play

        started, stage = time.perf_counter(), self.resolved(resolve)
        found = play(stage.recipe, stage.agent, stage.episodes, samples=stage.samples)
        write_episodes(self.folder / "episodes.jsonl", found.episodes)
        write_json_atomic(self.folder / SPENT, found.spent)
        seconds = time.perf_counter() - started
        episode_report(stage.recipe, found.episodes, stage.samples, seconds).save(self.folder / "report.json")

    def can_continue(self) -> bool:
        return False

    def next_steps(self) -> list[tuple[str, str]]:
        return [("episodes", str(self.folder / "episodes.jsonl")), ("report", str(self.folder / "report.json"))]


class EvalStage(Stage):
    """An evaluation of one model."""

    Config = EvalStageConfig
    artefacts = {"report": "report.json"}
    expects = {"model": "model", "model.path": "model"}
    packages = ("torch", "transformers", "math-verify")
    without_effect = ("workers", "address")

    def resolved(self, resolve: Resolve) -> EvalStageConfig:
        written = substitute(self.entry.config.model_dump(exclude_unset=True), resolve)
        if isinstance(written["model"], str):
            written["model"] = {"path": written["model"]}
        return EvalStageConfig.model_validate(written)

    def check(self, earlier: Mapping[str, Stage]) -> None:
        config = self.resolved(as_written)
        if max(config.k) > config.samples:
            raise RecipeError(f"pass@{max(config.k)} needs at least as many samples, got {config.samples}", where="k")
        assert isinstance(config.model, ModelConfig)  # `resolved` makes one of a path
        if config.model.adapted:
            raise RecipeError("an adapter section has no effect on evaluation", where="model.peft", hint="leave it out")
        check_benchmarks(config)
        check_model(config.model, self.run_code)

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.evaluation.runner import evaluate_model

        config = self.resolved(resolve)
        assert isinstance(config.model, ModelConfig)  # as in `check`
        evaluate_model(config.model, config, self.folder / "report.json")

    def next_steps(self) -> list[tuple[str, str]]:
        return [("report", str(self.folder / "report.json"))]


class CompareStage(Stage):
    """A paired comparison of two evaluation reports."""

    Config = CompareStageConfig
    artefacts = {"table": "table.json", "text": "table.md"}
    expects = {"base": "report", "other": "report"}

    _SAME = ("greedy", "samples", "temperature", "top_p", "max_new_tokens", "limit")

    def check(self, earlier: Mapping[str, Stage]) -> None:
        from posttrain.evaluation.report import Report

        config = self.resolved(as_written)
        for path in (config.base, config.other):
            if not REFERENCE.search(path):
                Report.load(Path(path))
        references = [REFERENCE.fullmatch(path) for path in (config.base, config.other)]
        stages = [earlier[match[1]] for match in references if match is not None]
        if len(stages) == 2 and all(isinstance(stage, EvalStage) for stage in stages):
            self._check_comparable(*stages)

    def _check_comparable(self, base: Stage, other: Stage) -> None:
        assert isinstance(base, EvalStage) and isinstance(other, EvalStage)
        ours, theirs = base.resolved(as_written), other.resolved(as_written)
        for key in self._SAME:
            if getattr(ours, key) != getattr(theirs, key):
                raise RecipeError(
                    f"stages {base.name} and {other.name} cannot be compared: "
                    f"`{key}` is {getattr(ours, key)} and {getattr(theirs, key)}",
                    where=other.place,
                    hint="evaluate both with the same settings",
                )
        names = [{b if isinstance(b, str) else b.name for b in config.benchmarks} for config in (ours, theirs)]
        if not names[0] & names[1]:
            raise RecipeError(f"stages {base.name} and {other.name} share no benchmark", where=other.place)

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.evaluation.compare import comparison_table

        comparison = self._comparison(resolve)
        rows = comparison_table(comparison)
        columns = list(rows[0]) if rows else []
        lines = [f"base: {comparison.base}, other: {comparison.other}", ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
        write_json_atomic(self.folder / "table.json", comparison.to_dict())
        write_text_atomic(self.folder / "table.md", "\n".join(lines) + "\n")

    def conclude(self, resolve: Resolve, console: Console) -> None:
        from posttrain.evaluation.compare import print_comparison

        print_comparison(self._comparison(resolve), console)

    def next_steps(self) -> list[tuple[str, str]]:
        return [("table", str(self.folder / "table.md"))]

    def _comparison(self, resolve: Resolve) -> Comparison:
        from posttrain.evaluation.compare import compare_reports
        from posttrain.evaluation.report import Report

        config = self.resolved(resolve)
        return compare_reports(Report.load(Path(config.base)), Report.load(Path(config.other)))


class SampleStage(Stage):
    """Traces of a model: many verified completions per prompt."""

    Config = SampleSettings
    artefacts = {"traces": "traces.jsonl"}
    expects = {"model.path": "model"}
    packages = ("torch", "transformers", "math-verify")
    without_effect = ("prompts_per_chunk", "threads", "rollouts.max_batch", "workers", "address")

    def check(self, earlier: Mapping[str, Stage]) -> None:
        config = self.resolved(as_written)
        check_source(config.data.prompts, "prompts")
        check_model(config.model, self.run_code)

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.rollouts.collect import collect

        collect(self.resolved(resolve), self.folder / "traces.jsonl", say=print)

    def can_continue(self) -> bool:
        return manifest_path(self.folder / "traces.jsonl").exists()

    def next_steps(self) -> list[tuple[str, str]]:
        path = self.folder / "traces.jsonl"
        return [("traces", str(path)), ("look at them", f"posttrain inspect {path}")]


class PairsStage(Stage):
    """Preference pairs out of traces."""

    Config = PairsStageConfig
    artefacts = {"pairs": "pairs.jsonl"}

    def check(self, earlier: Mapping[str, Stage]) -> None:
        config = self.resolved(as_written)
        for path in [*config.traces, *([] if config.own is None else [config.own])]:
            if not REFERENCE.search(path):
                read_manifest(Path(path))

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.data.pairs import write_pairs

        config = self.resolved(resolve)
        own = None if config.own is None else Path(config.own)
        report = write_pairs([Path(path) for path in config.traces], self.folder / "pairs.jsonl", config, own)
        say(f"{report.pairs:,} pairs of {report.prompts_used:,} of {report.prompts:,} prompts")

    def next_steps(self) -> list[tuple[str, str]]:
        return [("pairs", str(self.folder / "pairs.jsonl")), ("report", str(self.folder / "pairs.report.json"))]


class _TraceRowsStage(Stage):
    """Rows out of traces; the artefact has the name of the kind."""

    def check(self, earlier: Mapping[str, Stage]) -> None:
        for path in self.resolved(as_written).traces:
            if not REFERENCE.search(path):
                read_manifest(Path(path))

    def next_steps(self) -> list[tuple[str, str]]:
        ((name, file),) = self.artefacts.items()
        report = (self.folder / file).with_suffix(".report.json")
        return [(name, str(self.folder / file)), ("report", str(report))]


class ResponsesStage(_TraceRowsStage):
    """Rows of n scored responses out of traces."""

    Config = ResponsesStageConfig
    artefacts = {"responses": "responses.jsonl"}

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.data.trace_rows import write_responses

        config = self.resolved(resolve)
        report = write_responses([Path(path) for path in config.traces], self.folder / "responses.jsonl", config)
        say(f"{report.rows:,} rows of {config.n} responses of {report.prompts:,} prompts")


class CompletionsStage(_TraceRowsStage):
    """Correct completions out of traces."""

    Config = CompletionsStageConfig
    artefacts = {"completions": "completions.jsonl"}

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.data.trace_rows import write_completions

        config = self.resolved(resolve)
        report = write_completions([Path(path) for path in config.traces], self.folder / "completions.jsonl", config)
        say(f"{report.rows:,} correct completions of {report.prompts_used:,} of {report.prompts:,} prompts")


class ExtrapolateStage(Stage):
    """A model beyond that of a round, in the direction that it took."""

    Config = ExtrapolateStageConfig
    artefacts = {"model": "model"}
    expects = {"model": "model", "previous": "model"}
    packages = ("torch", "transformers")

    def check(self, earlier: Mapping[str, Stage]) -> None:
        config = self.resolved(as_written)
        for path in (config.model, config.previous):
            check_model(ModelConfig(path=path))

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.models.extrapolation import write_extrapolated

        config = self.resolved(resolve)
        with folder_atomic(self.folder / "model") as folder:
            write_extrapolated(config.model, config.previous, config.alpha, folder)

    def next_steps(self) -> list[tuple[str, str]]:
        return [("model", str(self.folder / "model"))]


STAGES: dict[str, type[Stage]] = {
    "train": TrainStage,
    "play": PlayStage,
    "eval": EvalStage,
    "compare": CompareStage,
    "sample": SampleStage,
    "pairs": PairsStage,
    "responses": ResponsesStage,
    "completions": CompletionsStage,
    "extrapolate": ExtrapolateStage,
    "attacks": AttacksStage,
    "refusals": RefusalsStage,
    "safety": SafetyStage,
}


def _output_is_set(where: str) -> RecipeError:
    return RecipeError(
        "a train stage writes into its own folder within the pipeline's output",
        where=where,
        hint="leave it out, and set `output` of the pipeline",
    )
