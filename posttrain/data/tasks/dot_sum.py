"""Dot sum, level n = cells with dots: a picture of 3, 8 and 5 dots is answered by `3+8+5=;3+8=11;11+5=16;#16`.

The first step says what is to be seen, the others add. So an answer that is wrong by what was seen can be told from one
that is wrong by what was added: a hallucination from a slip.
"""

from __future__ import annotations

import io
import random
import re
from functools import lru_cache
from typing import Any

from posttrain.config.schema import WeakAnnotator
from posttrain.data.pictures import mark, take_in
from posttrain.data.sample import Problem
from posttrain.data.tasks.base import NUMBER, check_answer, check_reduction, excess, unparseable, wrong
from posttrain.verifiers.verdict import Status, Verdict

SIDE, CELL, DOT = 32, 8, 2
"""Pixels of a side of the picture, of a cell, and of a dot, which stands at one of nine places of its cell."""

_SEEN = re.compile(rf"{NUMBER}(?:\+{NUMBER})*")


class DotSum:
    """Dots in the cells of a picture, counted cell by cell and added from left to right, row by row.

    On sums that it is unsure of (ones digit of the running sum + dots of the cell) the weak annotator may write a
    result that is too high, and goes on from it. It sees what is there, unless `miscount_share` says that it takes some
    numbers of dots for one more: then it describes, and adds, what is not in the picture. As no mistake makes anything
    smaller, no two of them cancel.
    """

    name = "dot_sum"
    levels = range(1, (SIDE // CELL) ** 2 + 1)
    pictures = True

    def problem(self, rng: random.Random, level: int) -> Problem:
        counts = [rng.randint(1, 9) for _ in range(level)]
        return Problem(
            id="",
            prompt=mark(take_in(_picture(counts, rng), None, f"{self.name} level {level}")),
            reference=str(sum(counts)),
            meta={"task": self.name, "level": level, "terms": counts, "target": sum(counts)},
        )

    def split_key(self, problem: Problem) -> str:
        return str(problem.meta["terms"])  # not the picture: pictures of the same dots must not be torn apart

    def expert_trace(self, problem: Problem) -> str:
        return _trace(problem.meta["terms"], random.Random(0), WeakAnnotator(unsure_share=0.0))

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> str:
        return _trace([_counted(term, rng, weakness) for term in problem.meta["terms"]], rng, weakness)

    def check_strict(self, problem: Problem, completion: str) -> Verdict:
        terms = problem.meta["terms"]
        said, _, rest = completion.strip().partition("=;")
        seen = self.check_description(problem, completion)
        if seen.status is Status.NO_ANSWER:
            return Verdict(Status.NO_ANSWER, 0.0, "no '#'") if "#" not in completion else unparseable(said[:30])
        if seen.status is Status.WRONG:
            return seen
        return check_reduction(terms, problem.meta["target"], rest, "+")

    def check_lenient(self, problem: Problem, completion: str) -> Verdict:
        return check_answer(str(problem.meta["target"]), completion)

    def check_description(self, problem: Problem, completion: str) -> Verdict:
        said, equals, _ = completion.strip().partition("=;")
        if not equals or not _SEEN.fullmatch(said):
            return Verdict(Status.NO_ANSWER, 0.0, "no description")
        shown = _said(problem.meta["terms"])
        return Verdict(Status.CORRECT, 1.0, said) if said == shown else wrong(f"{said} is said, {shown} is to be seen")


@lru_cache(maxsize=64)
def _miscounted(share: float, fact_seed: int) -> frozenset[int]:
    """The numbers of dots that a weak annotator may take for one more. Never 9, so that no cell has ten."""
    return frozenset(random.Random(f"miscounted {fact_seed}").sample(range(1, 9), round(share * 8)))


def _counted(term: int, rng: random.Random, weakness: WeakAnnotator) -> int:
    unsure = term in _miscounted(weakness.miscount_share, weakness.fact_seed)
    return term + 1 if unsure and rng.random() < weakness.miscount_rate else term


def _said(terms: list[int]) -> str:
    return "+".join(map(str, terms))


def _trace(terms: list[int], rng: random.Random, weakness: WeakAnnotator) -> str:
    total, steps = terms[0], [f"{_said(terms)}=;"]
    for term in terms[1:]:
        written = total + term + excess(total % 10, term, rng, weakness)
        steps.append(f"{total}+{term}={written};")
        total = written
    return "".join(steps) + f"#{total}"


def _picture(counts: list[int], rng: random.Random) -> bytes:
    """A picture of these numbers of dots, unpacked, so that its bytes are the same on every machine."""
    from PIL import Image

    image: Any = Image.new("L", (SIDE, SIDE))
    for cell, count in enumerate(counts):
        top, left = CELL * (cell * CELL // SIDE), cell * CELL % SIDE
        for place in rng.sample(range(9), count):
            corner = (left + 1 + DOT * (place % 3), top + 1 + DOT * (place // 3))
            image.paste(255, (*corner, corner[0] + DOT, corner[1] + DOT))
    held = io.BytesIO()
    image.save(held, "BMP")
    return held.getvalue()


TASK = DotSum()
