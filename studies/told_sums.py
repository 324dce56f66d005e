"""A task for recipes' `plugins`: sums with their own worked answer in front, `3+8=11;#11=3+8=`.

A model that is trained on these beside plain sums goes by what its prompt tells it, which self-distillation asks of it.
The completion (`annotator: weak`) is the told answer until it slips, and goes on from there as the weak annotator does:
behind a mistake of its own a model that was told writes what one that was not would write.
"""

from dataclasses import replace
from itertools import count

from posttrain.data.tasks import register, split_of
from posttrain.data.tasks.base import excess
from posttrain.data.tasks.chain_sum import TASK, ChainSum

SLIP = 0.05
"""Probability that a step leaves the told path, by a sum that is one or two too high."""


class ToldSum(ChainSum):
    name = "told_sum"

    def problem(self, rng, level):
        # No sum of chain_sum's test split, whose answers would be told in training.
        plain = next(found for _ in count() if split_of(TASK, found := TASK.problem(rng, level)) == "train")
        told = TASK.expert_trace(plain)
        return replace(plain, prompt=f"{told}={plain.prompt}", meta=plain.meta | {"task": self.name})

    def weak_trace(self, problem, rng, weakness):
        total, *terms = problem.meta["terms"]
        told, steps = True, []
        for term in terms:
            more = excess(total % 10, term, rng, weakness)
            if told:
                more = rng.choice((1, 2)) if rng.random() < SLIP else 0
                told = more == 0
            steps.append(f"{total}+{term}={total + term + more};")
            total += term + more
        return "".join(steps) + f"#{total}"


register(ToldSum())
