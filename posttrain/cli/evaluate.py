"""`posttrain eval`: options to an evaluation, and its report to the terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.tables import print_table
from posttrain.config.loading import parse_config
from posttrain.config.locations import Locations
from posttrain.config.schema import ModelConfig
from posttrain.config.workers import EvaluationRun
from posttrain.config.yaml_file import read_file
from posttrain.errors import NeedsError, RecipeError
from posttrain.imports import importing
from posttrain.phases import phase
from posttrain.terminal import console, say

if TYPE_CHECKING:
    from posttrain.evaluation.report import Report

HarnessArguments = dict[str, Any]
"""Arguments of `evaluation.harness.HarnessOptions`, which is imported late."""


def evaluation_config(config: Path | None, overrides: list[str]) -> EvaluationRun:
    """The evaluation from a file (or from nothing) and overrides on it.

    Raises:
        RecipeError: neither a file nor benchmarks, or as `load_config`.
    """
    data, locations = read_file(config) if config else ({}, Locations("command line"))
    if config is None and not any(text.startswith("benchmarks") for text in overrides):
        raise RecipeError("nothing to evaluate on", hint="give --benchmarks NAME,NAME (see --list) or --config FILE")
    parsed = parse_config(data, EvaluationRun, overrides, locations)
    if parsed.every is not None:
        raise NeedsError(
            "the key has no effect: it is the interval within a training run",
            where=locations.where(("every",)),
            hint="remove it",
        )
    return parsed


def evaluate_command(
    model: str | None,
    config: Path | None,
    overrides: list[str],
    settings: list[str],
    output: Path | None,
    harness: HarnessArguments | None = None,
) -> None:
    """Evaluate and print; writes the report to `output` if there is one.

    Args:
        model: folder or Hub id.
        config: file with the keys of `EvaluationRun`.
        overrides: on it; without a file and without benchmarks only the harness runs.
        settings: of the model, as `key=value` with the keys of a recipe's `model` section.
        output: file for the report.
        harness: what lm-evaluation-harness runs, into the same report.

    Raises:
        RecipeError: no model, nothing to evaluate on, or an unknown benchmark.
        ModelError, DataError, StackError, EngineError: as `evaluation.runner.evaluate_model`.
    """
    if model is None or "=" in model:
        raise RecipeError(
            "no model given", hint="posttrain eval MODEL --benchmarks NAME, where MODEL is a folder or id"
        )
    ours = harness is None or config is not None or any(text.startswith("benchmarks=") for text in overrides)
    evaluation = evaluation_config(config, overrides) if ours else None
    policy = parse_config({"path": model}, ModelConfig, settings)

    from posttrain.evaluation.compare import print_report

    report = _evaluated(policy, evaluation, harness, output)
    print_report(report, console())
    if output is not None:
        say(f"report: {output}")


def _evaluated(
    policy: ModelConfig, evaluation: EvaluationRun | None, harness: HarnessArguments | None, output: Path | None
) -> Report:
    phase("importing PyTorch and transformers")
    with importing():
        from posttrain.evaluation.harness import HarnessOptions, check_harness, evaluate_harness
        from posttrain.evaluation.runner import evaluate_model

    options = None if harness is None else HarnessOptions(**harness)
    if options is not None:
        check_harness(options)  # before the hours that our own benchmarks may take
    report = None
    if evaluation is not None:
        report = evaluate_model(policy, evaluation, output, say=lambda line: say(line, err=True))
    if options is None:
        assert report is not None  # one of the two is asked for
        return report
    theirs = evaluate_harness(policy, options, None)
    if report is not None:
        theirs = replace(report, harness=theirs.harness, versions=theirs.versions | report.versions)
    if output is not None:
        theirs.save(output)
    return theirs


def harness_arguments(
    name: str | None, tasks: str | None, tasks_path: Path | None, fewshot: int | None, limit: int | None, chat: bool
) -> HarnessArguments | None:
    """The options of `HarnessOptions`, or None where no harness is asked for.

    Raises:
        RecipeError: another harness, no tasks, or options without effect.
    """
    if name is None:
        given = {"--tasks": tasks, "--tasks-path": tasks_path, "--fewshot": fewshot, "--chat-template": chat or None}
        for option, value in given.items():
            if value is not None:
                raise RecipeError(f"{option} has no effect without --harness lm-eval")
        return None
    if name != "lm-eval":
        raise RecipeError(f"no harness {name!r}", where="--harness", hint="known: lm-eval")
    names = tuple(task.strip() for task in (tasks or "").split(",") if task.strip())
    if not names:
        raise RecipeError("no tasks given", where="--tasks", hint="names of lm-eval tasks, separated by commas")
    return {"tasks": names, "tasks_path": tasks_path, "fewshot": fewshot, "limit": limit, "chat_template": chat}


def refuse_beside_rewards(model: str | None, options: dict[str, Any]) -> None:
    """With --rewards the file names all models and rows.

    Raises:
        RecipeError: a model or an option of the evaluation of answers.
    """
    if model is not None and "=" not in model:
        raise RecipeError(f"no MODEL is read with --rewards, got {model!r}", hint="name models in the file's keys")
    for option, value in options.items():
        if value is not None:
            raise RecipeError(f"{option} has no effect with --rewards", hint="leave it out")


def print_benchmarks() -> None:
    """The benchmarks that can be named."""
    from posttrain.evaluation.benchmarks import BENCHMARKS

    rows = [(name, entry.licence, entry.note) for name, entry in BENCHMARKS.items()]
    print_table(rows, header=("benchmark", "licence", "note"))
