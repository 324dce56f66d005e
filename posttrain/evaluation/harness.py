"""The bridge to lm-evaluation-harness: its tasks, prompts and scores, our model loading and intervals.

The model is loaded as for any other evaluation and handed over. Of every document the harness gives a value per metric;
where a metric is the mean of values in [0, 1], it gets the interval of `statistics.mean_interval`, and two reports can
be paired by document. Other metrics (perplexity, corpus scores) are reported as the harness gives them, without an
interval. The package is an extra: pip install 'posttrain[eval]'.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from posttrain.config.schema import ModelConfig
from posttrain.config.stack import require
from posttrain.data.rendering import Renderer
from posttrain.errors import RecipeError, nearest
from posttrain.evaluation.report import SCHEMA, HarnessTask, Report
from posttrain.evaluation.statistics import mean_interval
from posttrain.models.loading import load_policy

_PACKAGES = ("posttrain", "lm-eval", "torch", "transformers", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """How lm-eval is run.

    Attributes:
        tasks: names of tasks, groups or tags; `*` as in file names.
        tasks_path: folder with further task files (YAML).
        fewshot: examples in the prompt; None as each task says.
        limit: first N documents of each task.
        batch_size: documents per forward pass.
        chat_template: put prompts into the chat template; the harness itself does not unless asked.
    """

    tasks: tuple[str, ...]
    tasks_path: Path | None = None
    fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    chat_template: bool = False


def check_harness(options: HarnessOptions) -> Any:
    """The harness's task manager, once every name is known to it.

    Raises:
        StackError: lm-eval is not installed.
        RecipeError: an unknown task; names the nearest.
    """
    require("eval", "lm_eval")
    from lm_eval.tasks import TaskManager

    if options.tasks_path is not None and not options.tasks_path.is_dir():
        raise RecipeError("no such folder of tasks", where=str(options.tasks_path))
    manager = TaskManager(include_path=None if options.tasks_path is None else str(options.tasks_path))
    for name in options.tasks:
        if not manager.match_tasks([name]):
            hint = nearest(name, manager.all_tasks) if "*" not in name else ""
            raise RecipeError(f"lm-eval has no task {name!r}", where="tasks", hint=hint)
    return manager


def evaluate_harness(model: ModelConfig, options: HarnessOptions, output: Path | None) -> Report:
    """Evaluate a model on tasks of the harness.

    Args:
        model: what to load, on the GPU if there is one.
        options: what to run.
        output: file for the report, or None.

    Raises:
        StackError, RecipeError: as `check_harness`; or a task that runs code, which the harness does without isolation.
        ModelError: the model cannot be loaded.
    """
    manager = check_harness(options)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    started = time.perf_counter()
    policy, tokenizer = load_policy(model, seed=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy.to(device).requires_grad_(False)
    wrapped = HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=options.batch_size, device=device)
    names = manager.match_tasks(list(options.tasks))
    for name, task in manager.load(names)["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(
                f"{name} runs generated code, which the harness does without isolation",
                where="tasks",
                hint="posttrain's own humaneval and mbpp run code in a sandbox",
            )
    results = simple_evaluate(
        model=wrapped,
        tasks=names,
        num_fewshot=options.fewshot,
        limit=options.limit,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=options.chat_template,
        task_manager=manager,
    )
    tasks = tuple(_task(name, results, options) for name in results["samples"])
    label = (model.path or "random weights") + (f"@{model.revision}" if model.revision else "")
    report = Report(
        schema=SCHEMA,
        model_label=label,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        engine="lm-eval",
        template_hash=Renderer(tokenizer).template_hash,
        versions={name: version(name) for name in _PACKAGES},
        seconds=time.perf_counter() - started,
        benchmarks=(),
        harness=tasks,
    )
    if output is not None:
        report.save(output)
    return report


def _task(name: str, results: Mapping[str, Any], options: HarnessOptions) -> HarnessTask:
    documents = sorted(results["samples"][name], key=lambda document: document["doc_id"])
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        by_filter.setdefault(document["filter"], []).append(document)
    values: dict[str, tuple[float, ...]] = {}
    for filter_name, rows in by_filter.items():
        for metric in rows[0]["metrics"]:
            found = [row[metric] for row in rows]
            if all(isinstance(value, int | float) for value in found):
                values[f"{metric},{filter_name}"] = tuple(float(value) for value in found)
    given = {
        key: float(value)
        for key, value in results["results"][name].items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    means = {key: kept for key, kept in values.items() if _is_mean(kept, given.get(key))}
    digest = hashlib.sha256()
    for document in next(iter(by_filter.values())):
        digest.update("".join(document[part] for part in ("doc_hash", "prompt_hash", "target_hash")).encode() + b"\n")
    return HarnessTask(
        name=name,
        version=str(results["versions"].get(name)),
        settings={
            "fewshot": int(results["n-shot"][name]),
            "limit": options.limit,
            "chat_template": options.chat_template,
        },
        problem_hash=digest.hexdigest(),
        metrics={key: mean_interval(kept) for key, kept in means.items()},
        other={key: value for key, value in given.items() if key not in means},
        values=means,
    )


def _is_mean(values: Sequence[float], given: float | None) -> bool:
    """Whether a metric is the plain mean of values that an interval can be given for."""
    if given is None or not values or not all(0.0 <= value <= 1.0 for value in values):
        return False
    return math.isclose(given, sum(values) / len(values), rel_tol=1e-6, abs_tol=1e-9)
