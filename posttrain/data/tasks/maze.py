"""Maze, level n = cells of a side: a picture of a maze is answered by `a1>b1,20,10=;a1S1;a2E2;b2N3;#3`.

The first step says what is to be seen: where the way begins (green) and ends (red), and row by row what each cell is
open to: 1 for the cell to its right, 2 for the one below, 3 for both. The others go, each from a cell to the next one,
and count. As in `seen_sum`, what is seen wrongly is told from what is gone or counted wrongly.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from posttrain.config.schema import WeakAnnotator
from posttrain.data.pictures import mark, take_in
from posttrain.data.sample import Problem
from posttrain.data.tasks.base import NUMBER, check_answer, excess, unparseable, wrong
from posttrain.data.tasks.seen_sum import SIDE, bytes_of, miscounted
from posttrain.verifiers.verdict import Status, Verdict

Cell = tuple[int, int]
"""Column and row, from 0."""

WAYS = {"N": (0, -1), "E": (1, 0), "S": (0, 1), "W": (-1, 0)}

_SEEN = re.compile(r"[a-f][1-6]>[a-f][1-6](?:,[0-3]{2,6}){2,6}")
_STEP = re.compile(rf"([a-f][1-6])([NESW]){NUMBER}")


class Maze:
    """One way from each cell to each other.

    The weak annotator goes the right way, but on sums with 1 that it is unsure of it may count too many steps, and goes
    on from there. With `miscount_share` it takes the row of the end for the next one, where that number is one that it
    is unsure of: then it describes, and goes to, another cell.
    """

    name = "maze"
    levels = range(2, 7)
    pictures = True

    def problem(self, rng: random.Random, level: int) -> Problem:
        opened = _grown(level, rng)
        begin, end = rng.sample([(x, y) for y in range(level) for x in range(level)], 2)
        steps = len(_way(opened, begin, end))
        return Problem(
            id="",
            prompt=mark(take_in(_picture(opened, begin, end), None, f"{self.name} level {level}")),
            reference=str(steps),
            meta={
                "task": self.name,
                "level": level,
                "open": opened,
                "ends": [list(begin), list(end)],
                "target": steps,
            },
        )

    def split_key(self, problem: Problem) -> str:
        return self._shown(problem)

    def expert_trace(self, problem: Problem) -> str:
        return self._trace(problem, problem.meta["ends"][1], random.Random(0), WeakAnnotator(unsure_share=0.0))

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> str:
        x, y = problem.meta["ends"][1]
        seen = min(miscounted(y + 1, rng, weakness), problem.meta["level"]) - 1
        end = [x, y] if [x, seen] == problem.meta["ends"][0] else [x, seen]
        return self._trace(problem, end, rng, weakness)

    def check_strict(self, problem: Problem, completion: str) -> Verdict:
        said, _, rest = completion.strip().partition("=;")
        seen = self.check_description(problem, completion)
        if seen.status is Status.NO_ANSWER:
            return Verdict(Status.NO_ANSWER, 0.0, "no '#'") if "#" not in completion else unparseable(said[:30])
        if seen.status is Status.WRONG:
            return seen
        return _check_way(problem, rest)

    def check_lenient(self, problem: Problem, completion: str) -> Verdict:
        return check_answer(str(problem.meta["target"]), completion)

    def check_description(self, problem: Problem, completion: str) -> Verdict:
        said, equals, _ = completion.strip().partition("=;")
        if not equals or not _SEEN.fullmatch(said):
            return Verdict(Status.NO_ANSWER, 0.0, "no description")
        shown = self._shown(problem)
        return Verdict(Status.CORRECT, 1.0, said) if said == shown else wrong(f"{said} is said, {shown} is to be seen")

    def _shown(self, problem: Problem) -> str:
        return _described(problem.meta["open"], *problem.meta["ends"])

    def _trace(self, problem: Problem, end: Sequence[int], rng: random.Random, weakness: WeakAnnotator) -> str:
        opened, begin = problem.meta["open"], problem.meta["ends"][0]
        steps, count = [f"{_described(opened, begin, end)}=;"], 0
        for cell, way in _way(opened, (begin[0], begin[1]), (end[0], end[1])):
            count += 1 + excess(count % 10, 1, rng, weakness)
            steps.append(f"{_named(cell)}{way}{count};")
        return "".join(steps) + f"#{count}"


def _check_way(problem: Problem, rest: str) -> Verdict:
    """Judge `a1S1;a2E2;#2`: each step begins where the last one ended, goes where the maze is open, and is counted."""
    opened, ((x, y), end), target = problem.meta["open"], problem.meta["ends"], problem.meta["target"]
    *steps, answer = rest.split(";", len(opened) ** 2)
    if "#" not in rest:
        return Verdict(Status.NO_ANSWER, 0.0, "no '#'")
    if not re.fullmatch("#" + NUMBER, answer):
        return unparseable(f"does not end in ';#' and a number: {answer[-20:]!r}")
    for place, step in enumerate(steps, start=1):
        parts = _STEP.fullmatch(step)
        if parts is None:
            return unparseable(f"step {place}: {step[:30]!r}")
        if parts[1] != _named((x, y)) or int(parts[3]) != place or not _is_open(opened, (x, y), parts[2]):
            return wrong(f"step {place}: {step}")
        x, y = x + WAYS[parts[2]][0], y + WAYS[parts[2]][1]
    if [x, y] != list(end):
        return wrong(f"{_named((x, y))} reached, not {_named(end)}")
    if len(steps) != target or int(answer[1:]) != target:
        return wrong(f"{len(steps)} steps, {answer[1:]} answered, not {target}")
    return Verdict(Status.CORRECT, 1.0, answer[1:])


def _grown(side: int, rng: random.Random) -> list[list[int]]:
    """Rows of cells, each with what it is open to: 1 to the right, 2 below. From a cell on, wherever none was yet."""
    opened = [[0] * side for _ in range(side)]
    path = [(rng.randrange(side), rng.randrange(side))]
    seen = set(path)
    while path:
        x, y = path[-1]
        onward = [(x + dx, y + dy) for dx, dy in WAYS.values()]
        onward = [(i, j) for i, j in onward if 0 <= i < side and 0 <= j < side and (i, j) not in seen]
        if not onward:
            path.pop()
            continue
        i, j = rng.choice(onward)
        opened[min(y, j)][min(x, i)] |= 1 if i != x else 2
        path.append((i, j))
        seen.add((i, j))
    return opened


def _is_open(opened: Sequence[Sequence[int]], cell: Cell, way: str) -> bool:
    dx, dy = WAYS[way]
    x, y = cell[0] + min(dx, 0), cell[1] + min(dy, 0)
    return x >= 0 and y >= 0 and bool(opened[y][x] & (1 if dx else 2))


def _way(opened: Sequence[Sequence[int]], begin: Cell, end: Cell) -> list[tuple[Cell, str]]:
    """The one way between two cells: the cells that it leaves, and where to."""
    ways: dict[Cell, list[tuple[Cell, str]]] = {begin: []}
    for cell in (going := [begin]):
        for way, (dx, dy) in WAYS.items():
            there = (cell[0] + dx, cell[1] + dy)
            if there not in ways and _is_open(opened, cell, way):
                ways[there] = [*ways[cell], (cell, way)]
                going.append(there)
    return ways[end]


def _named(cell: Sequence[int]) -> str:
    return f"{'abcdef'[cell[0]]}{cell[1] + 1}"


def _described(opened: Sequence[Sequence[int]], begin: Sequence[int], end: Sequence[int]) -> str:
    return ",".join([f"{_named(begin)}>{_named(end)}", *("".join(map(str, row)) for row in opened)])


def _picture(opened: Sequence[Sequence[int]], begin: Cell, end: Cell) -> bytes:
    """White walls of a pixel around the cells, and a square in the first and the last one."""
    from PIL import Image

    n = len(opened)
    cell = (SIDE - 1) // n
    image = Image.new("RGB", (SIDE, SIDE))
    for y, row in enumerate(opened):
        for x, way in enumerate(row):
            left, top = cell * x, cell * y
            right, below = left + cell, top + cell
            if not way & 1:
                image.paste((255, 255, 255), (right, top, right + 1, below + 1))
            if not way & 2:
                image.paste((255, 255, 255), (left, below, right + 1, below + 1))
    image.paste((255, 255, 255), (0, 0, 1, cell * n + 1))
    image.paste((255, 255, 255), (0, 0, cell * n + 1, 1))
    for (x, y), colour in ((begin, (0, 255, 0)), (end, (255, 0, 0))):
        image.paste(colour, (cell * x + 2, cell * y + 2, cell * (x + 1) - 1, cell * (y + 1) - 1))
    return bytes_of(image)


TASK = Maze()
