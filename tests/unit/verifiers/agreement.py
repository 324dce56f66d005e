"""How the verifier of mathematics agrees with labelled answers, beside plain math-verify.

    python tests/unit/verifiers/agreement.py [--every 1] [--data FOLDER] [--expressions 200] [--output FILE]

A script, which no test runs. All rows (`--every 1`) take some minutes; without it every tenth is judged.

Sets, all of which the project may carry or build:

- `kinds`, `hacks` (math_kinds.py), `judgement`, `table` (tests beside it): written by hand for this project.
- `expressions`: made by the project's own generator, equal and perturbed forms.
- `gsm8k`, `svamp` (--data, not carried): references of GSM8K and SVAMP (both MIT) written as models write them, and
  spoilt.

A row agrees if the verifier calls it correct where it is labelled so, and does not where it is not. Plain math-verify
parses reference and output with its defaults. `accepted` are wrong answers taken for right ones, `rejected` right ones
taken for wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.math_parse import math_verify
from posttrain.verifiers.pool import VerifierPool
from posttrain.verifiers.verdict import Status, Verdict


@dataclass(frozen=True, slots=True)
class Row:
    """Attributes:
    kind: set and kind.
    reference: gold answer.
    output: of a model.
    strict, lenient: whether it is right by each profile.
    """

    kind: str
    reference: str
    output: str
    strict: bool
    lenient: bool


class PlainMathVerify:
    """math-verify as it comes, as a verifier."""

    name = "math-verify"
    outcome = True

    def prepare(self) -> None:
        math_verify().parse("$x+1$", parsing_timeout=None)

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        # Its own bounds on time stay, which need the main thread: without them one expression can take for ever.
        package = math_verify()
        gold = package.parse(problem.reference or "") or package.parse(f"${problem.reference}$")
        right = package.verify(gold, package.parse(completion))
        return Verdict(Status.CORRECT if right else Status.WRONG, float(right))


def rows(data: Path | None, expressions: int) -> Iterator[Row]:
    """All labelled answers."""
    kinds, random_math = importlib.import_module("math_kinds"), importlib.import_module("random_math")
    for kind, found in kinds.KINDS.items():
        for reference, output, *labels in found:
            yield Row(f"kinds: {kind}", reference, output, labels[0] == kinds.C, labels[-1] == kinds.C)
    for kind, hacks in kinds.HACKS.items():
        for reference, output in hacks:
            yield Row(f"hacks: {kind}", reference, output, False, False)
    for name in ("judgement", "table"):
        for found in importlib.import_module(f"test_math_{name}").TABLE.values():
            for reference, output, *labels in found:
                yield Row(name, reference, output, labels[0] == "correct", labels[-1] == "correct")
    for triple in random_math.triples(expressions, seed=1):
        for written, label in ((triple.equal, True), (triple.perturbed, False)):
            yield Row("expressions", triple.expression, rf"\boxed{{{written}}}", label, label)
    for name, reference in (("gsm8k_test", _gsm8k), ("svamp", _svamp)):
        path = None if data is None else data / f"{name}.jsonl"
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines()[::10]:
                yield from _written(name.partition("_")[0], reference(json.loads(line)))


def _gsm8k(row: dict) -> str:
    return row["answer"].rpartition("#### ")[2]


def _svamp(row: dict) -> str:
    return str(row["Answer"]).removesuffix(".0")


def _written(name: str, gold: str) -> Iterator[Row]:
    number = re.sub(r"[^0-9.\-]", "", gold)
    right = (
        rf"so \boxed{{{gold}}}.",
        f"in all #### {number}",
        f"<answer>{number}</answer>",
        rf"$\boxed{{x={number}}}$",
    )
    for output in right:
        yield Row(f"{name}: right", gold, output, True, True)
    two = rf"\boxed{{{number}}} or \boxed{{{number}1}}"
    for output in (rf"\boxed{{{number}1}}", rf"\boxed{{2x={number}}}", two, f"#### -{number}1"):
        yield Row(f"{name}: spoilt", gold, output, False, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--expressions", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="judge one row of so many; default 10")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON lines with every row that a judge gets wrong")
    options = parser.parse_args()
    labelled = list(rows(options.data, options.expressions))[:: options.every]
    judges = {
        "strict": (MathVerifier(MathVerifier.Config(type="math")), lambda row: row.strict),
        "lenient": (MathVerifier(MathVerifier.Config(type="math", profile="lenient")), lambda row: row.lenient),
        "math-verify": (PlainMathVerify(), lambda row: row.lenient),
    }
    wrong: list[dict] = []
    counts: dict[str, dict[str, list[int]]] = {}
    for name, (verifier, label) in judges.items():
        print(f"{name}: {len(labelled):,} answers", file=sys.stderr, flush=True)
        for row, right in zip(labelled, _judge(verifier, labelled, options.workers), strict=True):
            cell = counts.setdefault(row.kind, {}).setdefault(name, [0, 0, 0])
            truth = label(row)
            cell[0 if right == truth else 1 if right else 2] += 1
            if right != truth:
                wrong.append({"judge": name, "kind": row.kind, "reference": row.reference, "output": row.output})
    _print(counts, judges)
    if options.output is not None:
        options.output.write_text("".join(json.dumps(each) + "\n" for each in wrong), encoding="utf-8")


def _judge(verifier: MathVerifier | PlainMathVerify, labelled: list[Row], workers: int) -> list[bool]:
    # The script is not importable by the workers, so plain math-verify runs here.
    here = isinstance(verifier, PlainMathVerify)
    pool = VerifierPool([verifier], VerifierPoolConfig(workers=0 if here else workers, timeout=30.0))
    problems = [Problem(str(number), "", row.reference) for number, row in enumerate(labelled)]
    verdicts = pool.verify(problems, [row.output for row in labelled])
    pool.close()
    return [verdict.status is Status.CORRECT for (verdict,) in verdicts]


def _print(counts: dict[str, dict[str, list[int]]], judges: dict[str, tuple[object, Callable]]) -> None:
    """One line per kind: agreement, accepted but wrong, rejected but right, for each judge."""
    print("| answers | rows |" + "".join(f" {name} |" for name in judges))
    print("|" + " --- |" * (2 + len(judges)))
    total: dict[str, list[int]] = {name: [0, 0, 0] for name in judges}
    for kind, cells in counts.items():
        print(
            f"| {kind} | {sum(cells['strict'])} |" + "".join(f" {_cell(cells[name])} |" for name in judges), flush=True
        )
        for name in judges:
            total[name] = [a + b for a, b in zip(total[name], cells[name], strict=True)]
    print(f"| all | {sum(total['strict'])} |" + "".join(f" {_cell(total[name])} |" for name in judges))
    print("\nagreement (accepted but wrong, rejected but right)")


def _cell(cell: list[int]) -> str:
    return f"{cell[0] / sum(cell):.1%} ({cell[1]}, {cell[2]})"


if __name__ == "__main__":
    main()
