"""Sums of numbers that are to be seen in a picture: 3, 8 and 5 are answered by `3+8+5=;3+8=11;11+5=16;#16`.

The first step says what is to be seen, the others add. So an answer that is wrong by what was seen can be told from one
that is wrong by what was added: a hallucination from a slip. Tasks are the classes below `SeenSum`, by how they draw.
"""

from __future__ import annotations

import io
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from posttrain.config.schema import WeakAnnotator
from posttrain.data.pictures import mark, take_in
from posttrain.data.sample import Problem
from posttrain.data.tasks.base import NUMBER, check_answer, check_reduction, excess, unparseable, wrong
from posttrain.verifiers.verdict import Status, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, CELL = 32, 8
"""Pixels of a side of the picture, and of a cell."""

_SEEN = re.compile(rf"{NUMBER}(?:\+{NUMBER})*")


class SeenSum(ABC):
    """Numbers 1..9 in the cells of a picture, read cell by cell and added from left to right, row by row.

    On sums that it is unsure of (ones digit of the running sum + number of the cell) the weak annotator may write a
    result that is too high, and goes on from it. It sees what is there, unless `miscount_share` says that it takes some
    numbers for one more: then it describes, and adds, what is not in the picture. As no mistake makes anything smaller,
    no two of them cancel.
    """

    name: str
    levels = range(1, (SIDE // CELL) ** 2 + 1)
    pictures = True

    @abstractmethod
    def draw(self, image: Image, corner: tuple[int, int], number: int, rng: random.Random) -> None:
        """Draw a number into the cell whose corner is there, white on black."""

    def problem(self, rng: random.Random, level: int) -> Problem:
        terms = [rng.randint(1, 9) for _ in range(level)]
        return Problem(
            id="",
            prompt=mark(take_in(self._picture(terms, rng), None, f"{self.name} level {level}")),
            reference=str(sum(terms)),
            meta={"task": self.name, "level": level, "terms": terms, "target": sum(terms)},
        )

    def split_key(self, problem: Problem) -> str:
        return str(problem.meta["terms"])  # not the picture: pictures of the same dots must not be torn apart

    def expert_trace(self, problem: Problem) -> str:
        return _trace(problem.meta["terms"], random.Random(0), WeakAnnotator(unsure_share=0.0))

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> str:
        return _trace([miscounted(term, rng, weakness) for term in problem.meta["terms"]], rng, weakness)

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

    def _picture(self, terms: Sequence[int], rng: random.Random) -> bytes:
        from PIL import Image as pillow

        image = pillow.new("L", (SIDE, SIDE))
        for cell, number in enumerate(terms):
            self.draw(image, (cell * CELL % SIDE, CELL * (cell * CELL // SIDE)), number, rng)
        return bytes_of(image)


def bytes_of(image: Image) -> bytes:
    """A picture, unpacked, so that its bytes are the same on every machine."""
    held = io.BytesIO()
    image.save(held, "BMP")
    return held.getvalue()


def miscounted(number: int, rng: random.Random, weakness: WeakAnnotator) -> int:
    """The number that a weak annotator sees in place of one."""
    unsure = number in _miscounted(weakness.miscount_share, weakness.fact_seed)
    return number + 1 if unsure and rng.random() < weakness.miscount_rate else number


@lru_cache(maxsize=64)
def _miscounted(share: float, fact_seed: int) -> frozenset[int]:
    """The numbers that a weak annotator may take for one more. Never 9, so that no cell has ten."""
    return frozenset(random.Random(f"miscounted {fact_seed}").sample(range(1, 9), round(share * 8)))


def _said(terms: Sequence[int]) -> str:
    return "+".join(map(str, terms))


def _trace(terms: Sequence[int], rng: random.Random, weakness: WeakAnnotator) -> str:
    total, steps = terms[0], [f"{_said(terms)}=;"]
    for term in terms[1:]:
        written = total + term + excess(total % 10, term, rng, weakness)
        steps.append(f"{total}+{term}={written};")
        total = written
    return "".join(steps) + f"#{total}"
