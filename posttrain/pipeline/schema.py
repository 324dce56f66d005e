"""The pipeline file: a name, an output folder and stages that read the artefacts of earlier stages. Without torch.

The kinds of stage come from the caller (`stages.STAGES`), so that a new kind is one class and no change here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from posttrain.config.collection import CompletionSettings, PairSettings, ResponseSettings
from posttrain.config.locations import Locations, raise_all
from posttrain.config.overrides import apply_overrides
from posttrain.config.schema import ModelConfig, Section
from posttrain.config.validation import Context, validate
from posttrain.config.workers import EvaluationRun
from posttrain.config.yaml_file import read_file
from posttrain.errors import RecipeError, nearest

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REFERENCE = re.compile(rf"\$\{{({IDENTIFIER.pattern})\.({IDENTIFIER.pattern})\}}")
_MEANT_AS_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
Location = tuple[str | int, ...]


class Kind(Protocol):
    """What the file format has to know of a kind of stage.

    Attributes:
        Config: type of the value under the kind's key.
        artefacts: artefact name -> path relative to the stage folder.
        expects: dotted key of the config -> the artefact that a reference there must name.
        takes_set: whether `set` has a meaning beside the config.
    """

    Config: Any
    artefacts: Mapping[str, str]
    expects: Mapping[str, str]
    takes_set: bool


class EvalStageConfig(EvaluationRun):
    """An evaluation of one model; the other keys are those of a recipe's `evaluation` section."""

    model: str | ModelConfig = Field(description="a reference, a Hub id or a folder; or a recipe's `model` section")

    @model_validator(mode="after")
    def _no_schedule(self) -> EvalStageConfig:
        if self.every is not None:
            raise ValueError("`every` has no effect in an eval stage: it is the interval within a training run")
        return self


class CompareStageConfig(Section):
    """A paired comparison of two reports on the benchmarks they share."""

    base: str = Field(description="report of an eval stage, or a report file")
    other: str = Field(description="report of an eval stage, or a report file")


class PairsStageConfig(PairSettings):
    """Pairs out of the traces of one stage or several; the other keys are those of `posttrain prepare pairs`."""

    traces: list[str] = Field(min_length=1, description="traces of sample stages, or trace files")
    own: str | None = Field(None, description="traces of the policy to be trained, to report the overlap with")


class ResponsesStageConfig(ResponseSettings):
    """Rows of n scored responses; the other keys are those of `posttrain prepare responses`."""

    traces: list[str] = Field(min_length=1, description="traces of sample stages, or trace files")


class CompletionsStageConfig(CompletionSettings):
    """Correct completions to imitate; the other keys are those of `posttrain prepare completions`."""

    traces: list[str] = Field(min_length=1, description="traces of sample stages, or trace files")


class ExtrapolateStageConfig(Section):
    """The step from one model to the next, taken a part further: momentum between rounds of training."""

    model: str = Field(description="model of a train stage, a folder or a Hub id")
    previous: str = Field(description="that of the round before, or of the start")
    alpha: float = Field(0.3, ge=0, lt=1, description="how much further; 0 gives the model itself (ours: 0.3)")


class PlayStageConfig(Section):
    """Episodes in the environment of a recipe, by its model or an agent, as `posttrain play` plays them."""

    recipe: str | dict[str, Any] = Field(description="recipe file, from the folder of the pipeline file, or in place")
    episodes: int = Field(ge=1, description="problems of data.prompts that are played, the first ones")
    samples: int = Field(1, ge=1, description="episodes of each")
    agent: str = Field("policy", description="who acts: the model, or an agent that the environment has")


class StageEntry(Section):
    """One stage, without the key of its kind (see `pipeline_schema`)."""

    name: str = Field(description="letters, digits and _, not starting with a digit; its folder and its references")
    set: dict[str, Any] = Field(
        default_factory=dict, description="dotted overrides of the recipe of a train or play stage"
    )

    @property
    def kind(self) -> str:
        """The kind of the stage: the one key beside `name` and `set`."""
        return next(name for name in type(self).model_fields if name in self.model_fields_set - {"name", "set"})

    @property
    def config(self) -> Any:
        """The value under the kind's key."""
        return getattr(self, self.kind)


class PipelineConfig(Section):
    pipeline: str = Field(description="name of the pipeline")
    output: str = Field(description="folder that holds one folder per stage")
    stages: list[StageEntry] = Field(min_length=1, description="in the order in which they run")


def pipeline_schema(kinds: Mapping[str, Kind]) -> type[PipelineConfig]:
    """The schema of a pipeline file whose stages may be of these kinds, with all checks across stages."""
    fields: dict[str, Any] = {name: (kind.Config | None, None) for name, kind in kinds.items()}
    entry = create_model("StageEntry", __base__=StageEntry, **fields)

    def across_stages(config: PipelineConfig) -> PipelineConfig:
        problems = list(_problems(config, kinds))
        if problems:
            raise ValidationError.from_exception_data("pipeline", [_detail(loc, text) for loc, text in problems])
        return config

    return create_model(
        "PipelineConfig",
        __base__=PipelineConfig,
        __validators__={"across_stages": model_validator(mode="after")(across_stages)},  # type: ignore[dict-item]  # as pydantic's manual has it
        stages=(list[entry], PipelineConfig.model_fields["stages"]),
    )


def load_pipeline(path: Path, overrides: Sequence[str], kinds: Mapping[str, Kind]) -> tuple[PipelineConfig, Locations]:
    """A pipeline from its file and overrides, with the line or override that each key comes from.

    Args:
        path: the pipeline file.
        overrides: `output=...`, or `<stage name>.<dotted key>=value`, where the key is one of the stage's recipe
            (train, play) or config (play too, and other kinds). Values are YAML; later ones win.
        kinds: name -> kind of stage.

    Raises:
        RecipeError: as `config.loading.load_config`, and for an override of an unknown stage.
    """
    data, locations = read_file(path)
    errors = []
    for override in overrides:
        try:
            _override(data, locations, override, kinds)
        except RecipeError as error:
            errors.append(error)
    raise_all(errors)
    return build_pipeline(data, locations, kinds), locations


def build_pipeline(data: dict[str, Any], locations: Locations, kinds: Mapping[str, Kind]) -> PipelineConfig:
    """A pipeline from plain data whose keys stand at `locations`.

    Raises:
        RecipeError: a key or value that cannot be.
    """
    schema = pipeline_schema(kinds)
    config, errors = validate(schema, data, Context(locations, schema))
    raise_all(errors)
    assert config is not None  # without errors there is one
    return config


def apply_at(data: dict[str, Any], locations: Locations, override: str, place: str) -> None:
    """Apply one override that comes from `place`, so that complaints name that instead of the override.

    Raises:
        RecipeError: as `config.overrides.apply_overrides`.
    """
    try:
        apply_overrides(data, locations, [override])
    except RecipeError as error:
        raise RecipeError(error.what, where=place, hint=error.hint) from error
    for path, known in locations.places.items():
        if known == f"override {override!r}":
            locations.places[path] = place


def _override(data: dict[str, Any], locations: Locations, override: str, kinds: Mapping[str, Kind]) -> None:
    key, _, text = override.partition("=")
    head, _, rest = key.strip().partition(".")
    stages = data["stages"] if isinstance(data.get("stages"), list) else []
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    place = f"override {override!r}"
    if head in PipelineConfig.model_fields or "=" not in override:
        apply_overrides(data, locations, [override])
        return
    if head not in names:
        known = [*PipelineConfig.model_fields, *(name for name in names if isinstance(name, str))]
        raise RecipeError(f"no stage {head!r}", where=place, hint=nearest(head, known))
    if not rest:
        raise RecipeError("an override of a stage is `stage.section.key=value`", where=place)
    number = names.index(head)
    stage = stages[number]
    kind = next((name for name in kinds if name in stage), None)
    if kind is None:
        return  # validation says that the stage has no kind
    # A stage that has keys beside its recipe, as the `episodes` of a play stage, takes them by name.
    if not kinds[kind].takes_set or rest in getattr(kinds[kind].Config, "model_fields", ()):
        apply_at(data, locations, f"stages.{number}.{kind}.{rest}={text}", place)
        return
    # The recipe of a train stage may be a file, so its overrides join `set`, where a dotted key is one key.
    scratch: dict[str, Any] = {}
    apply_at(scratch, Locations(place), f"value={text}", place)
    if stage.get("set") is None:
        stage["set"] = {}
    if isinstance(stage["set"], dict):
        stage["set"][rest] = scratch["value"]
        locations.replace(("stages", number, "set", rest), place, Locations(place))


def substitute(value: Any, resolve: Callable[[str, str], str]) -> Any:
    """`value` with every `${stage.artefact}` in its strings replaced by `resolve(stage, artefact)`."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: resolve(*match.groups()), value)
    if isinstance(value, Mapping):
        return {key: substitute(item, resolve) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, resolve) for item in value]
    return value


def references(entry: StageEntry) -> list[tuple[str, str]]:
    """(stage, artefact) of every reference of an entry, in order, without repeats."""
    found = [(match[1], match[2]) for _, text in strings(_raw(entry)) for match in REFERENCE.finditer(text)]
    return list(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------------- checks


def _problems(config: PipelineConfig, kinds: Mapping[str, Kind]) -> Iterator[tuple[Location, str]]:
    earlier: dict[str, str] = {}
    later = [entry.name for entry in config.stages]
    for number, entry in enumerate(config.stages):
        loc: Location = ("stages", number)
        later.remove(entry.name)
        if not IDENTIFIER.fullmatch(entry.name):
            yield (*loc, "name"), f"stage name {entry.name!r}: letters, digits and _ only, not starting with a digit"
        if entry.name in PipelineConfig.model_fields:
            yield (*loc, "name"), f"stage name {entry.name!r} is a key of the pipeline itself"
        if entry.name in earlier:
            yield (*loc, "name"), f"stage name {entry.name!r} is used twice"
        given = [name for name in kinds if name in entry.model_fields_set]
        if len(given) != 1 or entry.config is None:
            yield (
                loc,
                f"stage {entry.name!r} needs exactly one of {', '.join(kinds)}; it has {', '.join(given) or 'none'}",
            )
            continue
        if entry.set and not kinds[entry.kind].takes_set:
            yield (*loc, "set"), f"`set` has no effect in an {entry.kind} stage: write the values under `{entry.kind}`"
        for at, text in strings(_raw(entry)):
            for problem in _reference_problems(entry, at, text, earlier, later, kinds):
                yield (*loc, *at), problem
        earlier[entry.name] = entry.kind


def _reference_problems(
    entry: StageEntry, at: Location, text: str, earlier: Mapping[str, str], later: list[str], kinds: Mapping[str, Kind]
) -> Iterator[str]:
    whole = _MEANT_AS_REFERENCE.fullmatch(text)
    if whole and not REFERENCE.fullmatch(text):
        yield f"{text} is no reference: write ${{stage.artefact}}" + _example(whole[1], earlier, kinds)
    for stage, artefact in (match.groups() for match in REFERENCE.finditer(text)):
        written = f"${{{stage}.{artefact}}}"
        if stage == entry.name or stage in later:
            yield f"{written}: only stages before {entry.name!r} can be referenced, and {stage!r} is not one"
        elif stage not in earlier:
            yield f"{written}: no stage {stage!r} before {entry.name!r}; {nearest(stage, earlier) or 'it is the first'}"
        elif artefact not in kinds[earlier[stage]].artefacts:
            known = nearest(artefact, kinds[earlier[stage]].artefacts)
            yield f"{written}: stage {stage!r} ({earlier[stage]}) has no {artefact!r}; {known}"
        else:
            expected = kinds[entry.kind].expects.get(".".join(str(part) for part in at[1:]))
            if whole and expected not in (None, artefact):
                yield f"{written}: a {expected} is read here, not a {artefact}"


def _example(name: str, earlier: Mapping[str, str], kinds: Mapping[str, Kind]) -> str:
    if name not in earlier:
        return ""
    return ", e.g. " + " or ".join(f"${{{name}.{artefact}}}" for artefact in kinds[earlier[name]].artefacts)


def _raw(entry: StageEntry) -> dict[str, Any]:
    """The entry as written: defaults left out, sections as mappings."""
    return entry.model_dump(exclude_unset=True, exclude={"name"})


def strings(value: Any, loc: Location = ()) -> Iterator[tuple[Location, str]]:
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(item, (*loc, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, (*loc, index))


def _detail(loc: Location, text: str) -> InitErrorDetails:
    # the form of a ValueError in a validator; as the template itself the text's braces could be placeholders
    return InitErrorDetails(type=PydanticCustomError("value_error", "{error}", {"error": text}), loc=loc, input=None)
