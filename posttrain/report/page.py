"""The report as one HTML file: the template, the chart library and the data. It may ask for nothing: a policy in the
page lets its own two scripts run and no other, and opens no connection.

Whatever is foreign (completions, names, texts of errors) is in the data alone, compressed and in base64, and the page
puts it into the document as text. The one exception is the title, which is escaped here.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from posttrain import __version__
from posttrain.api import Run
from posttrain.evaluation.report import BenchmarkReport
from posttrain.report.collect import ComparisonFile, EvaluationFile, ReportSources
from posttrain.report.findings import findings
from posttrain.tracking.ledger import AMOUNTS
from posttrain.tracking.metrics import MetricError, healthy_range, require
from posttrain.tracking.panels import evaluation_metrics, panels_of
from posttrain.tracking.thumbnails import thumbnails

PLACES = ("step", "rollout", "place")
"""Keys of an entry of `tokens.jsonl` that say which sample it belongs to; rows of data have the first alone."""

DIGITS = 6
"""Significant digits of the values of curves."""


def data_of(collected: ReportSources) -> str:
    """What the page reads, as JSON."""
    return json.dumps(_clean(payload(collected)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def page(collected: ReportSources, *, follow: str = "") -> str:
    """The whole file.

    Args:
        collected: what it is about.
        follow: tag of this state at the server that the page asks for later ones; empty: it asks for nothing.
    """
    data = data_of(collected)
    folder = files("posttrain.report")
    parts = {
        "title": html.escape(_title(collected)),
        "follow": html.escape(follow),
        "data": base64.b64encode(gzip.compress(data.encode("utf-8", "replace"), 6, mtime=0)).decode(),
        "chart_style": (folder / "vendor" / "uPlot.min.css").read_text(encoding="utf-8").strip(),
        "chart_script": (folder / "vendor" / "uPlot.iife.min.js").read_text(encoding="utf-8").strip(),
    }
    template = (folder / "template.html").read_text(encoding="utf-8")
    # In one pass, so that nothing is looked for in what was put in.
    filled = re.sub(r"\{\{(title|follow|data|chart_style|chart_script)\}\}", lambda found: parts[found[1]], template)
    return filled.replace("{{policy}}", _policy(filled) + ("; connect-src 'self'" if follow else ""), 1)


def payload(collected: ReportSources) -> dict[str, Any]:
    """What the page reads, as JSON values but for numbers that are not finite."""
    logged = dict.fromkeys(name for run in collected.runs.values() for entry in run.metrics for name in entry)
    names = [name for name in logged if name not in ("step", "time")]
    # All completions of all evaluations of a long run would be too much to open: those of its first and last.
    first = {each.run: each.name for each in reversed(collected.evaluations)}
    last = {each.run: each.name for each in collected.evaluations}
    read = {*first.values(), *last.values()} | {each.name for each in collected.evaluations if each.run is None}
    return {
        "title": _title(collected),
        "version": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "findings": [asdict(finding) for finding in findings(collected)],
        "runs": [_run(name, run) for name, run in collected.runs.items()],
        "panels": _panels(names),
        "metrics": {name: _metric(name) for name in names},
        "evaluations": [_evaluation(each, texts=each.name in read) for each in collected.evaluations],
        "comparisons": [_comparison(each) for each in collected.comparisons],
        "studies": list(collected.studies.values()),
        "over_seeds": collected.over_seeds,
    }


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows by column; a column of texts that repeat is a table of them and the place of each row's in it.

    Args:
        rows: dictionaries whose keys may differ; a missing value is null.
    """
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        table = dict.fromkeys(value for value in values if isinstance(value, str))
        if table and 2 * len(table) <= len(values):
            places = {text: place for place, text in enumerate(table)}
            found[key] = {"table": list(table), "at": [places.get(v) if isinstance(v, str) else None for v in values]}
        else:
            found[key] = {"values": values}
    return found


# ------------------------------------------------------------------------------------------------------------ records


def _title(collected: ReportSources) -> str:
    studies = [study["name"] for study in collected.studies.values()]
    names = [*studies, *collected.over_seeds, *collected.runs] or [each.name for each in collected.evaluations]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _run(name: str, run: Run) -> dict[str, Any]:
    method, model = run.recipe.get("method") or {}, run.recipe.get("model") or {}
    named = (str(entry.get("prompt", "")) for entry in (*run.samples, *run.tokens))
    return {
        "name": name,
        "pictures": thumbnails(run.folder, named),
        "folder": str(run.folder),
        "method": method.get("name"),
        "model": model.get("path"),
        "curves": _curves(run.metrics),
        "alarms": run.alarms,
        "samples": columns(_with_tokens(run)),
        "rows": len(run.samples),
        "tokens": columns([entry for entry in run.tokens if "rollout" not in entry]),
        "trained": sum("rollout" not in entry for entry in run.tokens),
        "recipe": dict(_flat(run.recipe)),
        "environment": dict(_flat(run.environment)),
        "data": dict(_flat(run.data)),
    }


def _with_tokens(run: Run) -> list[dict[str, Any]]:
    """The samples, some with the values of their tokens: those of a rollout in the order that they were written in."""
    known = {
        (str(entry["rollout"]), str(entry.get("place"))): {key: entry[key] for key in entry if key not in PLACES}
        for entry in run.tokens
        if "rollout" in entry
    }
    rows, before = [], Counter[str]()
    for sample in run.samples:
        step = str(sample.get("step"))
        tokens = known.get((step, str(before[step])))
        before[step] += 1
        rows.append(sample if tokens is None else sample | {"tokens": tokens})
    return rows


def _curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """One row per step by column, with what had been spent by then where an entry does not say it."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in entries:
        steps.setdefault(entry["step"], {}).update(entry)
    rows = [steps[step] for step in sorted(steps)]
    spent = [*(f"{name}_total" for name in AMOUNTS), "wall_seconds"]
    before = {name: 0.0 for name in spent if any(name in row for row in rows)}
    for row in rows:
        for name, amount in before.items():
            before[name] = row.setdefault(name, amount)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_rounded(row.get(name), name) for row in rows] for name in names}


def _rounded(value: Any, name: str) -> Any:
    if isinstance(value, float) and math.isfinite(value) and name != "time":
        return float(f"{value:.{DIGITS}g}")
    return value


def _panels(names: Sequence[str]) -> list[dict[str, Any]]:
    """The panels of what was logged; then the rest by the first part of the name, so that nothing is left out."""
    evaluations = evaluation_metrics(names)
    made = [asdict(panel) | {"metrics": list(panel.metrics), "more": False} for panel in panels_of(names)]
    for panel in made:
        panel["metrics"] += evaluations if panel["evaluations"] else []
    drawn = {name for panel in made for name in panel["metrics"]}
    ends = {f"{name}_{end}" for name in names for end in ("low", "high")}
    for name in sorted(set(names) - drawn - ends):
        made.append({"title": name, "metrics": [name], "log": False, "zero": False, "smooth": True, "more": True})
    return made


def _metric(name: str) -> dict[str, Any]:
    try:
        metric = require(name)
    except MetricError:  # of a plugin that is not loaded here
        return {"meaning": "", "unit": "1", "healthy": None, "range": "", "alarm": ""}
    return {
        "meaning": metric.meaning,
        "unit": metric.unit,
        "healthy": metric.healthy,
        "range": healthy_range(metric),
        "alarm": metric.alarm,
    }


def _evaluation(evaluation: EvaluationFile, *, texts: bool) -> dict[str, Any]:
    report = evaluation.report
    return {
        "name": evaluation.name,
        "run": evaluation.run,
        "step": evaluation.step,
        "label": report.model_label,
        "created": report.created,
        "engine": report.engine,
        "seconds": report.seconds,
        "benchmarks": [_benchmark(each, texts=texts) for each in report.benchmarks],
        "harness": [
            {"name": task.name, "metrics": {name: asdict(found) for name, found in task.metrics.items()}}
            for task in report.harness
        ],
    }


def _benchmark(benchmark: BenchmarkReport, *, texts: bool) -> dict[str, Any]:
    passes = {"greedy": benchmark.greedy, "sampled": benchmark.sampled}
    return {
        "name": benchmark.name,
        "hash": benchmark.problem_hash,
        "sampling": asdict(benchmark.sampling),
        "metrics": {name: asdict(found) for name, found in benchmark.headline().items()},
        "passes": {
            name: asdict(each) | {"mean_length": each.mean_length} for name, each in passes.items() if each is not None
        },
        "records": {
            name: column
            for name, column in columns([asdict(record) for record in benchmark.records]).items()
            if texts or name not in ("prompt", "reference", "completions")
        },
        "problems": len(benchmark.records),
    }


def _comparison(compared: ComparisonFile) -> dict[str, Any]:
    return {
        "name": compared.name,
        "run": compared.run,
        "refused": compared.refused,
        "table": compared.table,
        "pairs": [asdict(change) for change in compared.pairs],
    }


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys and what they hold; lists of plain values whole."""
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for number, each in enumerate(value):
            yield from _flat(each, f"{key}.{number}")
    elif key:
        yield key, value


def _clean(value: Any) -> Any:
    """Numbers that are not finite as null, which JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    return value


# ------------------------------------------------------------------------------------------------------------- policy


def _policy(text: str) -> str:
    """A content security policy for the inline scripts and styles of the page, by their hashes, and nothing else."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    scripts = f"script-src {hashes('script')}; style-src {hashes('style')}"
    return f"default-src 'none'; {scripts}; img-src data:; base-uri 'none'"
