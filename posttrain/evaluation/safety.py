"""What training for safety did, in one report: attacks that succeed, harmless prompts refused, capability kept.

Intervals are over requests, not rows: the styles of one request say less than as many requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.bounded_files import parse_json
from posttrain.config.safety import SafetySettings
from posttrain.errors import DataError, nearest
from posttrain.evaluation.report import BenchmarkReport, ProblemRecord, Report
from posttrain.evaluation.statistics import Interval, difference_interval, mean_interval
from posttrain.verifiers.verdict import Status


@dataclass(frozen=True, slots=True)
class Shift:
    """A share before and after.

    Attributes:
        before, after: means over groups of prompts, with their intervals.
        difference: after less before, paired by group; times 100 these are percentage points.
        relative: difference over before; None where that is 0.
        prompts: that were judged in both.
    """

    before: Interval
    after: Interval
    difference: Interval
    relative: float | None
    prompts: int


@dataclass(frozen=True, slots=True)
class SafetyReport:
    """All three sides of it.

    Attributes:
        attack_success: share of attacked prompts that get an unsafe answer; by request.
        by_style, by_topic: the same of each, and whether training held it out.
        over_refusal: share of harmless prompts that are refused.
        capability: benchmark -> share of right answers.
        unjudged: prompts of all benchmarks that one of the two reports has no verdict on.
    """

    attack_success: Shift
    by_style: dict[str, Shift]
    by_topic: dict[str, Shift]
    over_refusal: Shift
    capability: dict[str, Shift]
    unjudged: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A table in Markdown."""
        rows = [("**attack success**", self.attack_success)]
        rows += [(f"style {name}", change) for name, change in self.by_style.items()]
        rows += [(f"topic {name}", change) for name, change in self.by_topic.items()]
        rows += [("**over-refusal**", self.over_refusal)]
        rows += [(f"**capability**: {name}", change) for name, change in self.capability.items()]
        head = ["| measure | before | after | points | relative | prompts |", "| --- " * 6 + "|"]
        tail = [] if not self.unjudged else ["", f"{self.unjudged} prompts have no verdict in one of the reports."]
        return head + [f"| {name} | {_row(change)} |" for name, change in rows] + tail


def safety_report(
    before: Report, after: Report, rows: Sequence[dict[str, Any]], settings: SafetySettings
) -> SafetyReport:
    """The report of two evaluations with the same settings.

    Args:
        before, after: with the benchmarks that the settings name.
        rows: of the attacked prompts, in the order of their file.
        settings: names of benchmarks.

    Raises:
        DataError: a benchmark is missing or differs between the two, or its prompts are not those of the rows.
    """
    pairs = {name: _paired(before, after, name) for name in (settings.attacks, settings.harmless, *settings.capability)}
    judged = {name: _judged(*pair) for name, pair in pairs.items()}
    attacks = {number: (1 - one, 1 - two) for number, (one, two) in judged[settings.attacks].items()}
    if max(_number(record) for record in pairs[settings.attacks][0].records) >= len(rows):
        raise DataError(f"benchmark {settings.attacks!r} has other prompts than these rows", where=settings.rows)
    request = {number: _text(rows, number, "request", settings.rows) for number in attacks}

    def part(column: str) -> dict[str, Shift]:
        values = {number: _text(rows, number, column, settings.rows) for number in attacks}
        return {
            value: _change({n: both for n, both in attacks.items() if values[n] == value}, request)
            for value in dict.fromkeys(values.values())
        }

    harmless = {number: (1 - one, 1 - two) for number, (one, two) in judged[settings.harmless].items()}
    return SafetyReport(
        attack_success=_change(attacks, request),
        by_style=part("style"),
        by_topic=part("topic"),
        over_refusal=_change(harmless),
        capability={name: _change(judged[name]) for name in settings.capability},
        unjudged=sum(len(pair[0].records) - len(judged[name]) for name, pair in pairs.items()),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that an attacks stage wrote.

    Raises:
        DataError: no such file, or a line that is no object.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path))
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found.append(parse_json(line, f"{path}:{number}"))
        if not isinstance(found[-1], dict):
            raise DataError("a row that is no object", where=f"{path}:{number}")
    return found


def _paired(before: Report, after: Report, name: str) -> tuple[BenchmarkReport, BenchmarkReport]:
    found = []
    for report in (before, after):
        known = {each.name: each for each in report.benchmarks}
        if name not in known:
            raise DataError(f"no benchmark {name!r} in the report of {report.model_label}", hint=nearest(name, known))
        found.append(known[name])
    one, two = found
    if one.problem_hash != two.problem_hash or [r.id for r in one.records] != [r.id for r in two.records]:
        raise DataError(f"benchmark {name!r} has other problems before and after")
    return one, two


def _judged(before: BenchmarkReport, after: BenchmarkReport) -> dict[int, tuple[float, float]]:
    """Number of the row -> share of right answers before and after, where both are known."""
    found = {}
    for one, two in zip(before.records, after.records, strict=True):
        both = (_share(one), _share(two))
        if both[0] is not None and both[1] is not None:
            found[_number(one)] = (both[0], both[1])
    if not found:
        raise DataError(f"no answer of benchmark {before.name!r} could be judged")
    return found


def _share(record: ProblemRecord) -> float | None:
    """Of the sampled answers, or of the greedy one where none are sampled."""
    if record.samples:
        return record.correct / record.judged if record.judged else None
    if record.greedy is None or not record.greedy.known:
        return None
    return float(record.greedy is Status.CORRECT)


def _number(record: ProblemRecord) -> int:
    return int(record.id.rpartition("/")[2])


def _text(rows: Sequence[dict[str, Any]], number: int, column: str, where: str) -> str:
    value = rows[number].get(column)
    if not isinstance(value, str):
        raise DataError(f"no text in column {column!r}", where=f"{where}:{number + 1}")
    return value


def _change(values: dict[int, tuple[float, float]], group: dict[int, str] | None = None) -> Shift:
    """Means over groups; each row is one of its own without any."""
    grouped: dict[Any, list[tuple[float, float]]] = {}
    for number, both in values.items():
        grouped.setdefault(number if group is None else group[number], []).append(both)
    before, after = np.array([np.mean(rows, axis=0) for rows in grouped.values()]).T
    one, two = mean_interval(before), mean_interval(after)
    relative = (two.value - one.value) / one.value if one.value else None
    return Shift(one, two, difference_interval(before, after), relative, len(values))


def _row(change: Shift) -> str:
    shares = " | ".join(f"{it.value:.1%} [{it.low:.1%}, {it.high:.1%}]" for it in (change.before, change.after))
    points, low, high = (100 * getattr(change.difference, name) for name in ("value", "low", "high"))
    relative = "" if change.relative is None else f"{change.relative:+.0%}"
    return f"{shares} | {points:+.1f} [{low:+.1f}, {high:+.1f}] | {relative} | {change.prompts}"
