"""Did it work, and how sure is that: one finding for each run, comparison and study, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from posttrain.api import Run
from posttrain.report.collect import ComparisonFile, ReportSources
from posttrain.tracking.console import duration
from posttrain.tracking.ledger import AMOUNTS, spent_in_words

Tone = Literal["better", "worse", "unclear", "unmeasured"]

ONE_RUN = "One run: what another seed would do is not known."
TWO_RUNS = "Two models, one run each: this says nothing about methods or other seeds."
UNMEASURED = (
    "In training only, on rows that it was trained on: nothing was measured on problems held out. Set `evaluation` in "
    "the recipe, or run `posttrain eval` on the model before and after."
)
IN_TRAINING = (*("reward", "pairs/accuracy", "unpaired/accuracy", "prm/accuracy", "token_accuracy", "loss"),)
"""The first of these that a run logged says how its training went, where nothing was measured beside it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a reader of the report should know.

    Attributes:
        tone: which way it went, as far as the evidence goes.
        about: what was trained or compared.
        on: data, steps and compute.
        found: what changed.
        sure: interval, test, and what is not known.
    """

    tone: Tone
    about: str
    on: str
    found: str
    sure: str


def findings(collected: ReportSources) -> list[Finding]:
    """What to read first: studies, what was trained, then models against each other; unmeasured runs last."""
    found = [_of_study(study) for study in collected.studies.values()]
    found += [_over_seeds(name, compared) for name, compared in collected.over_seeds.items()]
    against = []
    told: set[str] = set()
    for compared in (each for each in collected.comparisons if each.run is None):
        trained = _trained(compared, collected.runs)
        if trained is None:
            against.append(_of_comparison(compared, compared.name, None))
        else:
            run = collected.runs[trained]
            found.append(_of_comparison(compared, _title(trained, run), run))
            told.add(trained)
    for name, run in collected.runs.items():
        own = next((each for each in collected.comparisons if each.run == name), None)
        if own is not None:
            found.append(_of_comparison(own, f"{_title(name, run)}, between its steps", run))
        elif name not in told:
            found.append(_in_training(name, run))
    return sorted([*found, *against], key=lambda finding: finding.tone == "unmeasured")


# ---------------------------------------------------------------------------------------------------------- comparisons


def _of_comparison(compared: ComparisonFile, about: str, run: Run | None) -> Finding:
    """What changed in a run; without one, the second model against the first."""
    on = _on(run)
    if compared.refused:
        return Finding("unmeasured", about, on, "These evaluations cannot be compared.", compared.refused)
    changes = [] if compared.table is None else _first_of_each(compared.table["changes"])
    found = [_change_in_words(change, run is not None) for change in changes]
    sure = [_sure(change) for change in changes]
    intervals = [(change["difference"]["low"], change["difference"]["high"]) for change in changes]
    for pairs in (each for each in compared.pairs if each.measure == "accuracy"):
        found.append(f"Accuracy on held-out pairs is {pairs.other:.1%}, against {pairs.base:.1%}.")
        ends = "" if pairs.low is None or pairs.high is None else f" [{100 * pairs.low:+.1f}, {100 * pairs.high:+.1f}]"
        points = f"{100 * pairs.difference:+.1f}{ends} points"
        sure.append(f"Held-out pairs: {points}, {_p(pairs.test.p)}, {pairs.prompts:,} prompts.")
        intervals += [] if pairs.low is None else [(pairs.low, pairs.high)]
    for entry in [] if run is None else [entry for entry in run.metrics if "held_out/accuracy_high" in entry][-1:]:
        accuracy, low, high = (entry[f"held_out/accuracy{end}"] for end in ("", "_low", "_high"))
        found.append(f"{accuracy:.1%} of held-out pairs have moved towards what was chosen.")
        sure.append(f"Held-out pairs: [{low:.1%}, {high:.1%}], and 50% would be chance.")
        intervals.append((low - 0.5, high - 0.5))
    if not found:
        return Finding("unmeasured", about, on, "The two share no measure.", "Evaluate both with the same settings.")
    sure.append(TWO_RUNS if run is None else ONE_RUN)
    return Finding(_tone(intervals), about, on, " ".join(found), " ".join(sure))


def _first_of_each(changes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first measure of each benchmark, greedy accuracy where it was measured."""
    first: dict[str, Mapping[str, Any]] = {}
    for change in changes:
        first.setdefault(change["benchmark"], change)
    return list(first.values())


def _change_in_words(change: Mapping[str, Any], of_a_run: bool) -> str:
    measure = change["metric"][:1].upper() + change["metric"][1:]
    base, other = change["base"]["value"], change["other"]["value"]
    moved = _moved(base, other) if of_a_run else f"is {other:.1%}, against {base:.1%}"
    return f"{measure} accuracy on {change['benchmark']} {moved}."


def _moved(base: float, other: float) -> str:
    if base == other:
        return f"stayed at {base:.1%}"
    return f"{'rose' if other > base else 'fell'} from {base:.1%} to {other:.1%}"


def _sure(change: Mapping[str, Any]) -> str:
    difference = change["difference"]
    ends = f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
    return (
        f"{change['benchmark']}: {100 * difference['value']:+.1f} points, {difference['level']:.0%} interval {ends}, "
        f"{_p(change['test']['p'])}, {difference['problems']:,} problems, paired."
    )


def _tone(intervals: Sequence[tuple[float, float]]) -> Tone:
    """Better or worse where at least one interval says so and none the other."""
    up, down = any(low > 0 for low, _ in intervals), any(high < 0 for _, high in intervals)
    if up == down:
        return "unclear"
    return "better" if up else "worse"


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def _trained(compared: ComparisonFile, runs: Mapping[str, Run]) -> str | None:
    """The run whose model the second side of a comparison is: by its path, or as a stage of the same pipeline."""
    label = "" if compared.table is None else compared.table["other"]
    for name, run in runs.items():
        beside = compared.path is not None and compared.path.parents[1] == run.folder.parent
        if Path(label).resolve() == run.folder / "model" or (beside and label.endswith(f"/{run.folder.name}/model")):
            return name
    return None


# ---------------------------------------------------------------------------------------------------------------- runs


def _title(name: str, run: Run | None) -> str:
    method, model = (_section(run, "method").get("name"), _section(run, "model").get("path")) if run else (None, None)
    return f"{name}: {method or 'training'}" + (f" from {model}" if model else " from random weights" if method else "")


def _on(run: Run | None) -> str:
    if run is None:
        return ""
    sources = [source for each in _section(run, "data").values() for source in _sources(each)]
    totals: dict[str, float] = {}
    for entry in run.metrics:
        totals |= {name: entry[f"{name}_total"] for name in AMOUNTS if f"{name}_total" in entry}
    spent = [spent_in_words(totals)] if "flops" in totals and "cpu_seconds" in totals else []
    wall = [duration(entry["wall_seconds"]) for entry in run.metrics[-1:] if "wall_seconds" in entry]
    steps = max((entry["step"] for entry in run.metrics), default=0)
    return "; ".join([*(["on " + ", ".join(sources)] if sources else []), f"{steps:,} steps", *wall, *spent])


def _section(run: Run, name: str) -> Mapping[str, Any]:
    section = run.recipe.get(name)
    return section if isinstance(section, Mapping) else {}


def _sources(section: Any) -> list[str]:
    """Paths and tasks of a section of data, which may be a list of sources."""
    if isinstance(section, list):
        return [name for each in section for name in _sources(each)]
    if not isinstance(section, Mapping):
        return []
    found = section.get("path") or section.get("task")
    return [", ".join(map(str, found)) if isinstance(found, list) else str(found)] if found else []


def _in_training(name: str, run: Run) -> Finding:
    logged = {key for entry in run.metrics for key in entry}
    metric = next((each for each in IN_TRAINING if each in logged), None)
    about, on = _title(name, run), _on(run)
    if metric is None:
        return Finding("unmeasured", about, on, "No metric says how it went.", UNMEASURED)
    values = [entry[metric] for entry in run.metrics if metric in entry and math.isfinite(entry[metric])]
    if not values:
        return Finding("worse", about, on, f"No value of {metric} is finite.", "See the alarms.")
    part = max(1, len(values) // 10)
    first, last = fmean(values[:part]), fmean(values[-part:])
    moved = (
        f"{'rose' if last > first else 'fell'} from {first:.4g} to {last:.4g}"
        if last != first
        else f"stayed at {last:.4g}"
    )
    over = "first and last value" if part == 1 else f"means of the first and last {part} of {len(values)} values"
    return Finding("unmeasured", about, on, f"{metric} {moved} ({over}).", UNMEASURED)


# ------------------------------------------------------------------------------------------------------------- studies


def _of_study(study: Mapping[str, Any]) -> Finding:
    """Which arm is best, by how much over the baseline, and whether the test tells them apart."""
    arms = [arm for arm in study["arms"] if arm["mean"] is not None]
    names = [arm["name"] for arm in study["arms"]]
    about = f"{study['name']}: {' against '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else "")
    seeds = ", ".join(f"{len(arm['scores'])} of {arm['name']}" for arm in arms)
    on = "; ".join(filter(None, (f"{study['measure']} on {', '.join(study['benchmarks'])}", study["budget"])))
    failed = f" {len(study['failed'])} cells failed." if study["failed"] else ""
    if not arms:
        return Finding("unmeasured", about, on, "No arm has a score yet.", study["undecidable"] + failed)
    best = max(arms, key=lambda arm: arm["mean"])
    told = [each for each in study["decisions"] if each["outcome"] in ("first", "second")]
    found = [f"{best['name']} has the highest mean, {_percent(best)}."]
    found += [f"{each['words'].partition(', look')[0]}." for each in told]
    if not told:
        found += [_paired(each) for each in study["pairs"] if each["base"] == study["baseline"]]
    undecided = study["undecidable"] and f"No test: {study['undecidable']}."
    changed = "The plan changed after results were there, so this error holds no longer." if study["changes"] else ""
    sure = " ".join(filter(None, (f"Seeds: {seeds}; intervals are 95%.", study["error"], undecided, changed)))
    return Finding("better" if told else "unclear", about, on, " ".join(found), sure + failed)


def _percent(arm: Mapping[str, Any]) -> str:
    ends = "" if arm["low"] is None else f" [{100 * arm['low']:.1f}, {100 * arm['high']:.1f}]"
    return f"{100 * arm['mean']:.1f}%{ends}"


def _paired(pair: Mapping[str, Any]) -> str:
    if pair["value"] is None:
        return f"{pair['other']} shares no seed with {pair['base']}."
    ends = "" if pair["low"] is None else f" [{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}]"
    return f"{pair['other']} against {pair['base']}, paired by seed: {100 * pair['value']:+.1f}{ends} points."


def _over_seeds(name: str, study: Mapping[str, Any]) -> Finding:
    plan, decisions = study["plan"], study["result"]["decisions"]
    seeds = ", ".join(f"{len(method['runs'])} of {method['name']}" for method in study["methods"])
    told = [decision for decision in decisions if decision["outcome"] in ("first", "second")]
    return Finding(
        "better" if told else "unclear",
        f"{name}: {' against '.join(plan['methods'])}",
        f"{plan['measure']} on {', '.join(plan['benchmarks'])}; seeds: {seeds}",
        " ".join(_decision(each) for each in decisions),
        f"Error of any false difference at most {plan['alpha']:g} over all pairs and looks; look "
        f"{study['result']['looks']} of {plan['looks']}.",
    )


def _decision(decision: Mapping[str, Any]) -> str:
    pair = f"{decision['first']} and {decision['second']}"
    if decision["outcome"] in ("first", "second"):
        better, worse = decision["first"], decision["second"]
        if decision["outcome"] == "second":
            better, worse = worse, better
        return f"{better} is better than {worse} by {abs(100 * decision['difference']):.1f} points."
    points = "" if decision["difference"] is None else f" ({100 * decision['difference']:+.1f} points)"
    return f"{pair}: {decision['outcome']}{points}."
