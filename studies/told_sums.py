"""A task for recipes' `plugins`: sums with their own worked answer in front, `3+8=11;#11=3+8=`.

A model that is trained on these beside plain sums goes by what its prompt tells it, which self-distillation asks of it.
The completion (`annotator: weak`) is the told answer with a slip now and then, behind which it goes on as told: so the
model has seen answers that leave the told path, as a student's samples do.
"""

from dataclasses import replace
from itertools import count

from posttrain.data.tasks import register, split_of
from posttrain.data.tasks.chain_sum import TASK, ChainSum

SLIP = 0.02
"""Share of digits of a completion that are drawn anew."""


class ToldSum(ChainSum):
    name = "told_sum"

    def problem(self, rng, level):
        # No sum of chain_sum's test split, whose answers would be told in training.
        plain = next(found for _ in count() if split_of(TASK, found := TASK.problem(rng, level)) == "train")
        told = TASK.expert_trace(plain)
        return replace(plain, prompt=f"{told}={plain.prompt}", meta=plain.meta | {"task": self.name})

    def weak_trace(self, problem, rng, weakness):
        told = self.expert_trace(problem)
        return "".join(rng.choice("0123456789") if sign.isdigit() and rng.random() < SLIP else sign for sign in told)


register(ToldSum())
