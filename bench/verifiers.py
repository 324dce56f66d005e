"""Answers judged per second by the worker pool: `python bench/verifiers.py [--workers 2] [--data FOLDER]`.

The answers are like those of GSM8K: some sentences, then a boxed number, a third of them wrong. With `--data`, also
real references: `gsm8k_test.jsonl`, `minerva_math.jsonl` and `humaneval.jsonl.gz`, if the folder holds them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from pathlib import Path

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import StackError
from posttrain.verifiers.code import CodeVerifier
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.pool import VerifierPool

WARM_UP = 64
WORDS = "so she sells the eggs that are left at the market every day and earns two dollars for each of them which makes"

Written = tuple[list[Problem], list[str]]


def made_up(count: int) -> Written:
    """Word-problem answers of about 150 tokens with a reference each."""
    rng = random.Random(0)
    problems, answers = [], []
    for index in range(count):
        value = rng.choice([rng.randint(1, 200), rng.randint(1000, 200_000)])
        written = value if rng.random() < 2 / 3 else value + rng.randint(1, 9)
        text = "\n".join(" ".join(rng.choices(WORDS.split(), k=25)) + f" = {rng.randint(1, 999)}." for _ in range(5))
        forms = (f"$\\boxed{{{written}}}$", f"\\boxed{{\\${written:,}}}", f"\\boxed{{{written}\\text{{ dollars}}}}")
        answers.append(f"{text}\nThe final answer is {rng.choices(forms, (8, 1, 1))[0]}.")
        problems.append(Problem(str(index), "", f"{text}\n#### {value:,}"))
    return problems, answers


def real(folder: Path) -> dict[str, Written]:
    """Gold answers of the files that are there."""
    found = {}
    for name, column in (("gsm8k_test", "answer"), ("minerva_math", "solution")):
        if (folder / f"{name}.jsonl").exists():
            lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            gold = [json.loads(line)[column] for line in lines]
            found[name] = [Problem(str(number), "", text) for number, text in enumerate(gold)], gold
    return found


def humaneval(folder: Path) -> Written | None:
    path = folder / "humaneval.jsonl.gz"
    if not path.exists():
        return None
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    problems = [Problem(row["task_id"], row["prompt"], None, row) for row in rows]
    return problems, [row["canonical_solution"] for row in rows]


def measure(name: str, verifier: MathVerifier | CodeVerifier, workers: int, written: Written) -> None:
    """Print the rate on one set; starting the workers does not count."""
    problems, answers = written
    pool = VerifierPool([verifier], VerifierPoolConfig(workers=workers, timeout=60.0))
    pool.verify(problems[:WARM_UP], answers[:WARM_UP])
    started = time.perf_counter()
    verdicts = pool.verify(problems, answers)
    seconds = time.perf_counter() - started
    pool.close()
    correct = sum(verdict.status == "correct" for (verdict,) in verdicts)
    print(f"{name:24} {len(answers):6} answers {correct:6} correct {len(answers) / seconds:9,.0f} per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    for profile in ("strict", "lenient"):
        verifier = MathVerifier(MathVerifier.Config(type="math", profile=profile))
        measure(f"math {profile}, made up", verifier, options.workers, made_up(options.count))
        for name, written in (real(options.data) if options.data else {}).items():
            measure(f"math {profile}, {name}", verifier, options.workers, written)
    code = humaneval(options.data) if options.data else None
    if code is not None:
        try:
            verifier = CodeVerifier(CodeVerifier.Config(type="code", timeout=30.0))
        except StackError as error:
            print(f"code: not measured: {error.what}")
        else:
            measure("code, HumanEval", verifier, options.workers, code)


if __name__ == "__main__":
    main()
