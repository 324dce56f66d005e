"""Answers judged per second by the worker pool: `python bench/verifiers.py [--workers 2] [--count 8000]`.

The answers are like those of GSM8K: some sentences, then a boxed number, a third of them wrong.
"""

from __future__ import annotations

import argparse
import random
import time

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.pool import VerifierPool

WARM_UP = 64
WORDS = "so she sells the eggs that are left at the market every day and earns two dollars for each of them which makes"


def made_up(count: int) -> tuple[list[Problem], list[str]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=8000)
    options = parser.parse_args()
    problems, answers = made_up(options.count)
    for profile in ("strict", "lenient"):
        verifier = MathVerifier(MathVerifier.Config(type="math", profile=profile))
        pool = VerifierPool([verifier], VerifierPoolConfig(workers=options.workers, timeout=60.0))
        pool.verify(problems[:WARM_UP], answers[:WARM_UP])  # starting the workers does not count
        started = time.perf_counter()
        verdicts = pool.verify(problems, answers)
        seconds = time.perf_counter() - started
        pool.close()
        correct = sum(verdict.status == "correct" for (verdict,) in verdicts)
        print(
            f"math {profile}: {len(answers):,} answers, {correct:,} correct, {len(answers) / seconds:,.0f} per second"
        )


if __name__ == "__main__":
    main()
