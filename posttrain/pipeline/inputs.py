"""What a stage reads from outside the pipeline: which paths, and whether they can be read at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from posttrain.config.schema import BenchmarkConfig, FileSource, ModelConfig, Source
from posttrain.pipeline.schema import REFERENCE, CompareStageConfig

_HEAD = 4
"""Rows of each data source that are read to check it."""


def input_paths(config: Any) -> Iterator[str]:
    """Every path or Hub id that a resolved config reads: data, models and reports."""
    if isinstance(config, FileSource | ModelConfig):
        yield from [config.path] if config.path is not None else []
    elif isinstance(config, CompareStageConfig):
        yield from (config.base, config.other)
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


def check_source(source: Source, name: str, *, written: bool = False) -> None:
    """Read the first rows, so that a missing file or column is found now."""
    from posttrain.data.sources import examples, problems

    if isinstance(source, FileSource):
        if REFERENCE.search(source.path):
            return
        head: Source = source.model_copy(update={"limit": min(source.limit or _HEAD, _HEAD)})
    else:
        head = source.model_copy(update={"size": min(source.size, _HEAD)})
    (examples if written else problems)(head, name)


def check_benchmarks(benchmarks: list[str | BenchmarkConfig]) -> None:
    from posttrain.evaluation.benchmarks import resolve

    for benchmark in resolve(benchmarks):
        check_source(benchmark.data, benchmark.name)


def check_model(config: ModelConfig) -> None:
    """Load the tokenizer of a model that exists already, which finds a wrong id and a folder that holds no model."""
    from posttrain.models.loading import load_tokenizer

    if config.path is not None and not REFERENCE.search(config.path):
        load_tokenizer(config)
