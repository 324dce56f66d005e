"""Chain sum, level n = number of terms: `3+8+5=` is answered by `3+8=11;11+5=16;#16`."""

from __future__ import annotations

import random

from posttrain.config.schema import WeakAnnotator
from posttrain.data.sample import Problem
from posttrain.data.tasks.base import check_answer, check_reduction, excess
from posttrain.verifiers.verdict import Verdict


class ChainSum:
    """Sums of terms 1..9, added one after another.

    The strict check lets a trace add in any order; both annotators add from left to right. On facts it is unsure of
    (ones digit of the running sum + term) the weak annotator may write a result that is too high, and goes on from it.
    """

    name = "chain_sum"
    levels = range(1, 51)

    def problem(self, rng: random.Random, level: int) -> Problem:
        terms = [rng.randint(1, 9) for _ in range(level)]
        return Problem(
            id="",
            prompt="+".join(map(str, terms)) + "=",
            reference=str(sum(terms)),
            meta={"task": self.name, "level": level, "terms": terms, "target": sum(terms)},
        )

    def split_key(self, problem: Problem) -> str:
        return str(problem.prompt)

    def expert_trace(self, problem: Problem) -> str:
        return _trace(problem.meta["terms"], random.Random(0), WeakAnnotator(unsure_share=0.0))

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> str:
        return _trace(problem.meta["terms"], rng, weakness)

    def check_strict(self, problem: Problem, completion: str) -> Verdict:
        return check_reduction(problem.meta["terms"], problem.meta["target"], completion, "+")

    def check_lenient(self, problem: Problem, completion: str) -> Verdict:
        return check_answer(str(problem.meta["target"]), completion)


def _trace(terms: list[int], rng: random.Random, weakness: WeakAnnotator) -> str:
    total, steps = terms[0], []
    for term in terms[1:]:
        written = total + term + excess(total % 10, term, rng, weakness)
        steps.append(f"{total}+{term}={written};")
        total = written
    return "".join(steps) + f"#{total}"


TASK = ChainSum()
