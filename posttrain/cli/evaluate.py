"""`posttrain eval`: options to an evaluation, and its report to the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.cli.tables import print_table
from posttrain.config.loading import parse_config
from posttrain.config.locations import Locations
from posttrain.config.schema import EvaluationConfig, ModelConfig
from posttrain.config.yaml_file import read_file
from posttrain.errors import NeedsError, RecipeError


def evaluation_config(config: Path | None, overrides: list[str]) -> EvaluationConfig:
    """The evaluation from a file (or from nothing) and overrides on it.

    Raises:
        RecipeError: neither a file nor benchmarks, or as `load_config`.
    """
    data, locations = read_file(config) if config else ({}, Locations("command line"))
    if config is None and not any(text.startswith("benchmarks") for text in overrides):
        raise RecipeError("nothing to evaluate on", hint="give --benchmarks NAME,NAME (see --list) or --config FILE")
    parsed = parse_config(data, EvaluationConfig, overrides, locations)
    if parsed.every is not None:
        raise NeedsError(
            "the key has no effect: it is the interval within a training run",
            where=locations.where(("every",)),
            hint="remove it",
        )
    return parsed


def evaluate_command(
    model: str | None, config: Path | None, overrides: list[str], dtype: str, revision: str | None, output: Path | None
) -> None:
    """Evaluate and print; writes the report to `output` if there is one.

    Raises:
        RecipeError: no model, nothing to evaluate on, or an unknown benchmark.
        ModelError, DataError: as `evaluation.runner.evaluate_model`.
    """
    if model is None or "=" in model:
        raise RecipeError(
            "no model given", hint="posttrain eval MODEL --benchmarks NAME, where MODEL is a folder or id"
        )
    evaluation = evaluation_config(config, overrides)
    settings: dict[str, Any] = {"path": model, "dtype": dtype}
    policy = parse_config(settings | ({"revision": revision} if revision else {}), ModelConfig)

    from rich.console import Console

    from posttrain.evaluation.compare import print_report
    from posttrain.evaluation.runner import evaluate_model

    report = evaluate_model(policy, evaluation, output)
    print_report(report, Console())
    if output is not None:
        print(f"report: {output}")


def print_benchmarks() -> None:
    """The benchmarks that can be named."""
    from posttrain.evaluation.benchmarks import BENCHMARKS

    rows = [(name, entry.licence, entry.note) for name, entry in BENCHMARKS.items()]
    print_table(rows, header=("benchmark", "licence", "note"))
