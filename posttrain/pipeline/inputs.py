"""What a stage reads from outside the pipeline: which paths, and whether they can be read at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from posttrain.config.loading import load_config
from posttrain.config.mixtures import parts
from posttrain.config.registered import RegisteredSection
from posttrain.config.safety import AttackSettings, RefusalSettings, SafetySettings
from posttrain.config.schema import (
    BenchmarkFile,
    CriticConfig,
    EvaluationConfig,
    FileSource,
    ModelConfig,
    Source,
    Traces,
    TraceSource,
    ValueSearchConfig,
)
from posttrain.data.episodes import holds_episodes
from posttrain.data.traces import read_manifest
from posttrain.pipeline.schema import (
    REFERENCE,
    CompareStageConfig,
    CompletionsStageConfig,
    ExtrapolateStageConfig,
    PairsStageConfig,
    ResponsesStageConfig,
)

_HEAD = 4
"""Rows of each data source that are read to check it."""


def input_paths(config: Any) -> Iterator[str]:
    """Every path or Hub id that a resolved config reads: data, models and reports."""
    if isinstance(config, FileSource | ModelConfig | CriticConfig | ValueSearchConfig):
        yield from [config.path] if config.path is not None else []
    elif isinstance(config, TraceSource):
        yield from [config.path] if isinstance(config.path, str) else config.path
    elif isinstance(config, CompareStageConfig):
        yield from (config.base, config.other)
    elif isinstance(config, ExtrapolateStageConfig):
        yield from (config.model, config.previous)
    elif isinstance(config, PairsStageConfig):
        yield from [*config.traces, *([] if config.own is None else [config.own])]
    elif isinstance(config, AttackSettings):
        yield config.requests
    elif isinstance(config, SafetySettings):
        yield from (config.before, config.after, config.rows)
    elif isinstance(config, ResponsesStageConfig | CompletionsStageConfig | RefusalSettings):
        yield from config.traces
    elif isinstance(config, RegisteredSection):
        yield from config.inputs()
    elif isinstance(config, EvaluationConfig):
        yield from config.benchmark_paths.values()
        for file in (name for name in config.benchmarks if isinstance(name, str) and name.endswith((".yaml", ".yml"))):
            yield file
            yield from input_paths(load_config(file, BenchmarkFile))
    if isinstance(config, BaseModel):
        for name in type(config).model_fields:
            yield from input_paths(getattr(config, name))
    elif isinstance(config, list | tuple):
        for item in config:
            yield from input_paths(item)


def local_paths(config: Any) -> Iterator[Path]:
    """Those of `input_paths` that are files or folders of this machine."""
    for path in map(Path, input_paths(config)):
        if path.expanduser().exists():
            yield path.expanduser()


def check_source(
    source: Source | Traces | list[Source],
    name: str,
    *,
    reads: Literal["prompts", "completions", "preferences", "unpaired", "stepwise", "traces"] = "prompts",
) -> None:
    """Read the first rows as what they are to be, so that a missing file or column is found now."""
    if isinstance(source, list):
        for label, each in parts(source, name):
            check_source(each, label, reads=reads)
        return
    from posttrain.data.sources import READERS, examples

    if isinstance(source, TraceSource):
        for path in input_paths(source):
            if not REFERENCE.search(path) and not holds_episodes(Path(path)):
                read_manifest(Path(path))
        return
    if isinstance(source, FileSource):
        if REFERENCE.search(source.path):
            return
        head: Source = source.model_copy(update={"limit": min(source.limit or _HEAD, _HEAD)})
    else:
        head = source.model_copy(update={"size": min(source.size, _HEAD)})
    (READERS | {"traces": examples})[reads](head, name)


def check_benchmarks(evaluation: EvaluationConfig) -> None:
    from posttrain.evaluation.benchmarks import resolve

    for benchmark in resolve(evaluation.benchmarks, evaluation.benchmark_paths):
        check_source(benchmark.data, benchmark.name)


def check_model(config: ModelConfig, run_code: bool = True) -> None:
    """Load the tokenizer of a model that exists already, which finds a wrong id and a folder that holds no model.

    One whose code it may have to run is left unread without `run_code`.
    """
    from posttrain.models.tokenizer import load_tokenizer

    withheld = config.trust_remote_code and not run_code
    if config.path is not None and not REFERENCE.search(config.path) and not withheld:
        load_tokenizer(config)
