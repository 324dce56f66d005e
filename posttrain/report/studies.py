"""What the report shows of a study: arms, their curves over compute with bands, differences paired by seed, decisions
for every pair, and what was tuned."""

from __future__ import annotations

from dataclasses import asdict
from itertools import permutations
from statistics import fmean
from typing import Any

from posttrain.errors import DataError
from posttrain.evaluation.arms import Json, band, baseline, curves, mean, paired, scores, unit_of, units_of
from posttrain.evaluation.seeds import in_words
from posttrain.evaluation.sequential import Decision
from posttrain.evaluation.statistics import Interval
from posttrain.tracking.ledger import UNITS

KEYS = {"study", "arms", "comparison", "plan", "config"}
"""That `study.json` of a study has, and no other file that the report reads."""


def study_of(data: Json, where: str) -> dict[str, Any]:
    """A study as plain data, ready to be shown.

    Args:
        data: its `study.json`.
        where: the file.

    Returns:
        `name`, `measure`, `benchmarks`, `budget` in words, `baseline` (None before any arm has a score), `arms`,
        `pairs` (each arm against each), `decisions` in words, `undecidable` (why there are none), `error` (what the
        test keeps), `changes`, `failed`.

    Raises:
        DataError: it is damaged.
    """
    try:
        return _study(data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"not the file of a study: {error!r}", where=where) from error


def _study(data: Json) -> dict[str, Any]:
    compared = data["comparison"]
    decisions = [] if compared is None else [Decision(**each) for each in compared["result"]["decisions"]]
    arms = [_arm(arm) for arm in data["arms"]]
    reports = [set(cell["scores"]) for arm in data["arms"] for cell in arm["cells"] if not cell["error"]]
    return {
        "name": str(data["study"]),
        "measure": str(data["plan"]["measure"]),
        "benchmarks": sorted(set[str]().union(*reports)),
        "budget": _budget(data["config"].get("budget") or {}),
        "baseline": baseline(data) if any(arm["mean"] is not None for arm in arms) else None,
        "arms": arms,
        "pairs": [
            _pair(first, second, decisions)
            for first, second in permutations(data["arms"], 2)
            if scores(first) and scores(second)
        ],
        "decisions": [asdict(each) | {"words": in_words(each)} for each in decisions],
        "undecidable": str(data["undecidable"]),
        "error": "" if compared is None else _error(compared),
        "changes": [str(each) for each in data["changes"]],
        "failed": [
            f"{arm['name']}, seed {cell['seed']}: {cell['error']}"
            for arm in data["arms"]
            for cell in (*arm["tuning"], *arm["cells"])
            if cell["error"]
        ],
    }


def _arm(arm: Json) -> dict[str, Any]:
    own = scores(arm)
    done = [cell for cell in arm["cells"] if not cell["error"]]
    found = curves(arm)
    average, ends = mean(list(own.values())) if own else (None, None)
    return {
        "name": arm["name"],
        "setting": arm["setting"],
        "scores": {str(seed): score for seed, score in own.items()},
        "mean": average,
        **_ends(ends),
        "steps": fmean(cell["steps"] for cell in done) if done else None,
        "spent": {unit: fmean(unit_of(cell["spent"], unit) for cell in done) for unit in UNITS} if done else {},
        "tuned": [{"setting": each["setting"], "score": each["score"]} for each in arm["tuned"]],
        "runs": [str(cell["run"]) for cell in done],
        "bands": {unit: [part.tolist() for part in band(found, unit)] for unit in units_of(found)},
    }


def _pair(base: Json, other: Json, decisions: list[Decision]) -> dict[str, Any]:
    """The other arm against the base."""
    found = paired(base, other)
    value, ends, seeds = (None, None, 0) if found is None else found
    names = (base["name"], other["name"])
    decision = next((each for each in decisions if {each.first, each.second} == set(names)), None)
    better = None
    if decision is not None and decision.outcome in ("first", "second"):
        better = decision.first if decision.outcome == "first" else decision.second
    said = (
        "" if decision is None else decision.outcome if better is None else "better" if better == names[1] else "worse"
    )
    return {"base": names[0], "other": names[1], "value": value, **_ends(ends), "seeds": seeds, "said": said}


def _ends(interval: Interval | None) -> dict[str, float | None]:
    return {"low": None, "high": None} if interval is None else {"low": interval.low, "high": interval.high}


def _budget(budget: Json) -> str:
    unit = next((unit for unit in UNITS if budget.get(unit) is not None), None)
    name = "FLOPs" if unit == "flops" else str(unit).replace("_", " ")
    return "" if unit is None else f"{budget[unit]:.3g} {name} for each arm and seed"


def _error(compared: Json) -> str:
    plan, result = compared["plan"], compared["result"]
    text = f"The chance of any false difference is at most {plan['alpha']:g} over all pairs and looks; this is look "
    text += f"{result['looks']} of {plan['looks']}."
    gap = compared["compute_gap"]
    if gap is not None and gap > plan["tolerance"]:
        text += f" Compute differs by {gap:.0%}, so a difference may be one of compute."
    return text
