"""The README.md of a saved model: what it was made from and how, with the front matter that the Hub reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import posttrain
from posttrain.config.adapters import resolved
from posttrain.config.loading import as_yaml, recipe_values
from posttrain.config.schema import FileSource, ModelConfig, Recipe
from posttrain.evaluation.report import Report
from posttrain.models.start_files import start_file
from posttrain.models.tokenizer import looks_local
from posttrain.safe_files import write_text_atomic

SOURCES = ("prompts", "completions", "preferences", "unpaired", "stepwise", "traces")
"""Sections of `data` that hold sources."""


def write_card(
    folder: Path, recipe: Recipe, *, run_dir: Path, steps: int, spent: str, classifier: bool, kind: str
) -> None:
    """Write README.md into the folder of a saved model, in place of one that a library has written.

    Args:
        folder: of the model.
        recipe: of the run.
        run_dir: of the run; its newest evaluation gives the figures.
        steps: optimizer steps done.
        spent: compute of the run, in words.
        classifier: the model scores texts and writes none.
        kind: `model`, `adapter` or `critic`.
    """
    start = start_of(recipe.model)
    report = _newest_report(run_dir)
    name = hub_name(recipe) or run_dir.name
    front = ModelCardData(
        model_name=name,
        license=start.get("license"),
        base_model=start.get("base_model"),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-classification" if classifier or kind == "critic" else "text-generation",
        datasets=_hub_data(recipe) or None,
        tags=["posttrain", recipe.method.name, *(["lora"] if recipe.model.adapted else [])],
        eval_results=_results(report) if kind == "model" and report is not None else None,
    )
    text = _text(recipe, name, start, {"optimizer steps": str(steps), "compute": spent}, kind, report)
    write_text_atomic(folder / "README.md", f"---\n{front.to_yaml()}\n---\n\n{text}")


def hub_name(recipe: Recipe) -> str | None:
    """The repository that the run is published as, if it is."""
    return recipe.training.hub_model_id if recipe.training.push_to_hub else None


def start_of(model: ModelConfig) -> dict[str, str]:
    """What is known of the start: `base_model` if it is on the Hub, `license` if its card says one, `words` for all."""
    if model.path is None:
        return {"words": f"random weights ({model.init.architecture})"}
    base = resolved(model)
    found = {"words": Path(base.path).name if looks_local(base.path) else base.path}
    if not looks_local(base.path):
        found["base_model"] = base.path
    card = start_file(base, "README.md")
    if card is not None:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
        for key in ("license", "base_model"):
            value = getattr(data, key, None)
            if isinstance(value, str):
                found.setdefault(key, value)
    return found


def _text(
    recipe: Recipe, name: str, start: dict[str, str], done: dict[str, str], kind: str, report: Report | None
) -> str:
    what = {"adapter": "A LoRA adapter", "critic": "The value model of a run"}.get(kind, "A model")
    lines = [f"# {name}", "", f"{what} trained with posttrain {posttrain.__version__}.", ""]
    lines += [
        "| | |",
        "| --- | --- |",
        f"| method | {recipe.method.name} |",
        f"| start | {start['words']} |",
        f"| licence of the start | {start.get('license', 'not known')} |",
        *(f"| {what} | {amount} |" for what, amount in done.items()),
        f"| data | {'; '.join(_data(recipe)) or 'none'} |",
        "",
    ]
    if report is not None:
        lines += ["## Figures", "", f"By {report.model_label}, with 95% intervals.", ""]
        lines += ["| benchmark | measure | value | interval |", "| --- | --- | --- | --- |"]
        for benchmark in report.benchmarks:
            for measure, found in benchmark.headline().items():
                interval = f"{found.low:.3f} to {found.high:.3f}"
                lines.append(f"| {benchmark.name} | {measure} | {found.value:.3f} | {interval} |")
        lines.append("")
    lines += ["## Recipe", "", "```yaml", _recipe(recipe).rstrip(), "```", ""]
    return "\n".join(lines)


def _data(recipe: Recipe) -> list[str]:
    """Of each section its sources: files, data sets, tasks or generators."""
    found = []
    for key, sources in _sources(recipe):
        named: list[str] = []
        for source in sources:
            paths = getattr(source, "path", None) or getattr(source, "task", None) or source.reasoning_gym
            named += [paths] if isinstance(paths, str) else paths
        found.append(f"{key}: {', '.join(map(_public, named))}")
    return found


def _sources(recipe: Recipe) -> Iterator[tuple[str, list[Any]]]:
    for key in SOURCES:
        given = getattr(recipe.data, key)
        if given is not None:
            yield key, given if isinstance(given, list) else [given]


def _hub_data(recipe: Recipe) -> list[str]:
    given = [source for _, sources in _sources(recipe) for source in sources]
    paths = [source.path for source in given if isinstance(source, FileSource)]
    return [path for path in paths if "/" in path and not looks_local(path)]


def _public(path: str) -> str:
    """A path without the folders of this machine."""
    return Path(path).name if path.startswith(("/", "~", ".")) else path


def _recipe(recipe: Recipe) -> str:
    """The recipe as YAML, without the folders of this machine."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        return (
            Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) and " " not in value else value
        )

    return as_yaml(cut(recipe_values(recipe)))


def _newest_report(run_dir: Path) -> Report | None:
    paths = sorted((run_dir / "evaluation").glob("step-*.json"))
    return Report.load(paths[-1]) if paths else None


def _results(report: Report) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=benchmark.name,
            dataset_name=benchmark.name,
            metric_type=measure,
            metric_value=round(found.value, 4),
        )
        for benchmark in report.benchmarks
        for measure, found in benchmark.headline().items()
    ]
