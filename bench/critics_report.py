"""What the cells of `critics.py` say: tables with intervals over seeds, and what the values get right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.evaluation.statistics import difference_interval, mean_interval

AGAINST = {"offline": "sft", "resets": "ppo"}
"""The arm that the others of a part are compared with."""
Cell = dict[str, Any]


def auc(right: Sequence[float], wrong: Sequence[float]) -> float | None:
    """Share of pairs of a right and a wrong text in which the right one has the higher value; ties count half.

    None without a pair.
    """
    if not right or not wrong:
        return None
    difference = np.asarray(right)[:, None] - np.asarray(wrong)[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def within(rows: Sequence[tuple[int, float, bool]]) -> float | None:
    """`auc` over pairs of one problem only.

    Args:
        rows: (problem, value, right).
    """
    by_problem: dict[int, tuple[list[float], list[float]]] = {}
    for number, value, right in rows:
        by_problem.setdefault(number, ([], []))[right].append(value)
    pairs = [(len(right) * len(wrong), auc(right, wrong)) for wrong, right in by_problem.values() if right and wrong]
    return sum(n * share for n, share in pairs) / sum(n for n, _ in pairs) if pairs else None


def report(output: Path, parts: dict[str, Sequence[str]]) -> str:
    """Markdown of the finished cells.

    Args:
        output: folder of the cells.
        parts: arms by part.
    """
    cells = {part: {arm: read(output / part, arm) for arm in arms} for part, arms in parts.items()}
    sections = [accuracies(part, cells[part]) for part in ("offline", "resets")]
    sections += [ways(cells["search"]), values(cells["search"])]
    return "\n\n".join(section for section in sections if section) + "\n"


def read(folder: Path, arm: str) -> list[Cell]:
    """The finished cells of an arm, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"{arm}-[0-9]*.json")]
    return sorted(found, key=lambda cell: cell["seed"])


def percent(numbers: Sequence[float]) -> str:
    """Mean over seeds in percent, with the 95% t interval from two seeds on."""
    if len(numbers) < 2:
        return f"{100 * numbers[0]:.1f}"
    found = mean_interval(numbers, method="t")
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def against(cells: Sequence[Cell], others: Sequence[Cell], measure: str) -> str:
    """Mean difference to another arm in points, over the seeds that both have, with the paired t interval."""
    theirs = {cell["seed"]: cell[measure] for cell in others}
    pairs = [(theirs[cell["seed"]], cell[measure]) for cell in cells if cell["seed"] in theirs]
    if len(pairs) < 2:
        return f"{100 * (pairs[0][1] - pairs[0][0]):+.1f}" if pairs else "-"
    found = difference_interval([a for a, _ in pairs], [b for _, b in pairs])
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def accuracies(part: str, arms: dict[str, list[Cell]]) -> str:
    other = AGAINST[part]
    head = f"| arm | seeds | greedy | one sample | greedy, less {other} | GFLOPs | CPU s |"
    lines = [f"## {part}", "", head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for arm, cells in arms.items():
        if not cells:
            continue
        greedy, sample = (percent([cell[name] for cell in cells]) for name in ("greedy", "avg@4"))
        difference = "" if arm in ("base", other) else against(cells, arms[other], "greedy")
        gflops, seconds = (np.mean([cell[name] for cell in cells]) for name in ("flops", "cpu_seconds"))
        row = f"| {arm} | {len(cells)} | {greedy} | {sample} | {difference} | {gflops / 1e9:.0f} | {seconds:.0f} |"
        lines.append(row)
    return "\n".join(lines) if len(lines) > 4 else ""


def ways(arms: dict[str, list[Cell]]) -> str:
    """Greedy, guided and best of n, in percent, with tokens per problem."""
    lines = ["## search", "", "| value model | how | accuracy | less greedy | tokens per problem |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for arm, cells in arms.items():
        for way in cells[0]["ways"] if cells else ():
            found = [{"seed": cell["seed"], **cell["ways"][way]} for cell in cells]
            greedy = [{"seed": cell["seed"], **cell["ways"]["greedy"]} for cell in cells]
            difference = "" if way == "greedy" else against(found, greedy, "accuracy")
            tokens = np.mean([one["tokens"] for one in found])
            accuracy = percent([one["accuracy"] for one in found])
            lines.append(f"| {arm} | {way} | {accuracy} | {difference} | {tokens:.0f} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def values(arms: dict[str, list[Cell]]) -> str:
    """What the values of finished samples get right."""
    names = ("auc", "within", "auc_likely", "auc_unlikely", "unlikely_wrong", "unlikely_right")
    lines = ["## values of finished samples", "", f"| value model | {' | '.join(names)} |", "| --- " * 7 + "|"]
    for arm, cells in arms.items():
        if cells:
            known = {name: [c["values"][name] for c in cells if c["values"][name] is not None] for name in names}
            found = [f"{np.mean(known[name]):.2f}" if known[name] else "-" for name in names]
            lines.append(f"| {arm} | {' | '.join(found)} |")
    return "\n".join(lines) if len(lines) > 4 else ""
