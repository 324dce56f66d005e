"""Preference runs compared row by row on their held-out pairs. Reads the files of `preferences.py`, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.bounded_files import MAX_REPORT, read_json
from posttrain.errors import DataError
from posttrain.evaluation.pair_accuracy import by_prompt, mean_over_prompts
from posttrain.evaluation.statistics import PairedTest, difference_interval, sign_flip_test
from posttrain.safe_files import refuse_links_out

FOLDER = "held_out"
MARGINS = {"accuracy": "margins", "accuracy per token": "margins_per_token"}
"""Measure -> list of the file that it is counted from."""

_STEP = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True, slots=True)
class PairChange:
    """One measure in two runs.

    Attributes:
        measure: `accuracy`, `accuracy per token` (shares), `margin` or `KL` (nats).
        base: mean over prompts.
        other: the same of the other run.
        difference: other - base, paired by prompt.
        low, high: ends of its 95% interval; None with fewer than two prompts.
        test: sign flips of the differences, of no difference.
        prompts: that both runs measured.
    """

    measure: str
    base: float
    other: float
    difference: float
    low: float | None
    high: float | None
    test: PairedTest
    prompts: int


def all_pairs(run: Path) -> dict[int, Path]:
    """Step -> the evaluation of held-out pairs that a run made after it; empty without any.

    Raises:
        DataError: a link leads out of the folder.
    """
    refuse_links_out(run)
    return {int(match[1]): file for file in (run / FOLDER).glob("step-*.json") if (match := _STEP.fullmatch(file.name))}


def last_pairs(run: Path) -> Path | None:
    """The last evaluation of held-out pairs in a run folder; None without one."""
    files = all_pairs(run)
    return files[max(files)] if files else None


def compare_pairs(base: Path, other: Path) -> list[PairChange]:
    """What changed between two evaluations of the same held-out pairs.

    Each row is paired with itself, and prompts count once, with the mean over their pairs. A tie is not right.

    Args:
        base: file of one run.
        other: file of another.

    Raises:
        DataError: a file without rows, or other pairs in it.
    """
    ours, theirs = _rows(base), _rows(other)
    if ours["pairs"] != theirs["pairs"]:
        raise DataError(
            f"the runs held out other pairs ({len(ours['pairs'])} and {len(theirs['pairs'])}): rows cannot be paired",
            where=f"{base} and {other}",
            hint="give both the same `evaluation.preferences` and `data.preferences`, and the same `seed`",
        )
    prompts = ours["prompts"]
    changes = []
    for measure, key in MARGINS.items():
        right = [by_prompt(np.array(rows[key]) > rows["tie"], prompts) for rows in (ours, theirs)]
        interval = difference_interval(*right)
        changes.append(replace(_change(measure, *right), low=interval.low, high=interval.high))
    margins = [by_prompt(np.array(rows["margins"]), prompts) for rows in (ours, theirs)]
    changes.append(_change("margin", *margins))
    if ours["kl"] and len(ours["kl"]) == len(theirs["kl"]):
        kl = [np.array(rows["kl"]) for rows in (ours, theirs)]
        changes.append(_change("KL", *kl))
    return changes


def print_pairs(base: str, other: str, changes: Sequence[PairChange], console: Console) -> None:
    """Print a comparison, in 80 columns."""
    console.print(Text(f"base:  {base}\nother: {other}"))
    console.print()
    console.print(Text(f"held-out pairs, {changes[0].prompts:,} prompts", style="bold"))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for index, (name, width) in enumerate({"measure": 18, "base": 9, "other": 9, "difference": 27, "p": 7}.items()):
        table.add_column(name, min_width=width, justify="left" if index == 0 else "right", no_wrap=True)
    for change in changes:
        scale, form = (100.0, ".1f") if change.measure.startswith("accuracy") else (1.0, ".4f")
        ends = "" if change.low is None else f" [{scale * change.low:+{form}}, {scale * change.high:+{form}}]"
        p = "<0.0001" if change.test.p < 1e-4 else f"{change.test.p:.4f}"
        values = (f"{scale * value:{form}}" for value in (change.base, change.other))
        table.add_row(change.measure, *values, f"{scale * change.difference:+{form}}{ends}", p)
    console.print(table)
    console.print()
    note = (
        "Accuracy in percent, margin and KL to the start in nats; means over prompts, differences paired by row, with "
    )
    console.print(
        Text(f"{note}95% intervals; p from a sign-flip test, not corrected for the number of rows.", style="dim")
    )


def _rows(path: Path) -> Mapping[str, Any]:
    found = read_json(path, most=MAX_REPORT)
    rows = found.get("rows") if isinstance(found, dict) else None
    if rows is None:
        raise DataError("the evaluation has no rows to pair", where=str(path), hint="evaluate with this version")
    lists = [rows.get(key) if isinstance(rows, dict) else None for key in ("pairs", "prompts", *MARGINS.values())]
    if not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists) or not {"tie", "kl"} <= set(
        rows
    ):
        raise DataError("the rows of this evaluation are not whole", where=str(path), hint="evaluate again")
    return rows


def _change(measure: str, base: NDArray[np.float64], other: NDArray[np.float64]) -> PairChange:
    mean, test = mean_over_prompts(other - base), sign_flip_test(other - base)
    values = float(base.mean()), float(other.mean()), mean.value, mean.low, mean.high
    return PairChange(measure, *values, test, len(base))
