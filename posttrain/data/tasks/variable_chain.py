"""Variable chain, level n = chain length: `b=a+7;a=3;b?` is answered by `a=3;b=3+7=0#0`. All sums are modulo 10."""

from __future__ import annotations

import random
import re
from string import ascii_lowercase

from posttrain.config.schema import WeakAnnotator
from posttrain.data.sample import Problem
from posttrain.data.tasks.base import check_answer, excess, unparseable, wrong
from posttrain.verifiers.verdict import Status, Verdict

MAX_DISTRACTORS = 4
_STEP = re.compile(r"([a-z])=(?:([0-9])\+([0-9])=)?([0-9])")


class VariableChain:
    """Shuffled definitions, some of which (0 to 4) do not matter; the value of one variable is asked.

    The strict check wants each variable derived once, from its definition and after the one it depends on; deriving
    distractors too is allowed. The weak annotator is unsure of facts "value + addend" as in chain sum. Its excess is
    one or two, so mistakes can cancel modulo 10 only from the fifth on.
    """

    name = "variable_chain"
    levels = range(1, 21)

    def problem(self, rng: random.Random, level: int) -> Problem:
        names = rng.sample(ascii_lowercase, level + rng.randint(0, MAX_DISTRACTORS))
        chain = names[:level]
        definitions: dict[str, tuple[str | None, int]] = {chain[0]: (None, rng.randint(0, 9))}
        parent: str | None
        for parent, name in zip(chain, chain[1:], strict=False):
            definitions[name] = (parent, rng.randint(1, 9))
        for name in names[level:]:
            parent = rng.choice([None, *definitions])
            definitions[name] = (parent, rng.randint(1, 9) if parent else rng.randint(0, 9))
        lines = [
            f"{name}={parent}+{digit}" if parent else f"{name}={digit}" for name, (parent, digit) in definitions.items()
        ]
        rng.shuffle(lines)
        value = sum(definitions[name][1] for name in chain) % 10
        return Problem(
            id="",
            prompt=";".join([*lines, f"{chain[-1]}?"]),
            reference=str(value),
            meta={
                "task": self.name,
                "level": level,
                "chain": chain,
                "definitions": {name: list(definition) for name, definition in definitions.items()},
                "target": value,
            },
        )

    def split_key(self, problem: Problem) -> str:
        return str(problem.prompt)

    def expert_trace(self, problem: Problem) -> str:
        return self.weak_trace(problem, random.Random(0), WeakAnnotator(unsure_share=0.0))

    def weak_trace(self, problem: Problem, rng: random.Random, weakness: WeakAnnotator) -> str:
        first, *others = problem.meta["chain"]
        value = problem.meta["definitions"][first][1]
        steps = [f"{first}={value}"]
        for name in others:
            addend = problem.meta["definitions"][name][1]
            written = (value + addend + excess(value, addend, rng, weakness)) % 10
            steps.append(f"{name}={value}+{addend}={written}")
            value = written
        return ";".join(steps) + f"#{value}"

    def check_strict(self, problem: Problem, completion: str) -> Verdict:
        body, mark, answer = completion.strip().partition("#")
        if not mark:
            return Verdict(Status.NO_ANSWER, 0.0, "no '#'")
        if not re.fullmatch("[0-9]", answer):
            return unparseable(f"does not end in '#' and a digit: {answer[:20]!r}")
        definitions: dict[str, list] = problem.meta["definitions"]
        values: dict[str, int] = {}
        for place, step in enumerate(body.split(";", len(definitions)), start=1):
            parts = _STEP.fullmatch(step)
            if parts is None:
                return unparseable(f"step {place}: {step[:30]!r}")
            name = parts[1]
            expected = _right_step(name, definitions, values)
            if name in values or step != expected:
                return wrong(f"step {place}: {step}")
            values[name] = int(parts[4])
        if int(answer) != values.get(problem.meta["chain"][-1]):
            return wrong(f"{answer} is not derived")
        return Verdict(Status.CORRECT, 1.0, answer)

    def check_lenient(self, problem: Problem, completion: str) -> Verdict:
        return check_answer(str(problem.meta["target"]), completion)


def _right_step(name: str, definitions: dict[str, list], values: dict[str, int]) -> str | None:
    """The one right way to derive a variable from what is known so far; None if there is none yet."""
    if name not in definitions:
        return None
    parent, digit = definitions[name]
    if parent is None:
        return f"{name}={digit}"
    if parent not in values:
        return None
    return f"{name}={values[parent]}+{digit}={(values[parent] + digit) % 10}"


TASK = VariableChain()
