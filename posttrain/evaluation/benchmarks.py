"""The benchmarks that a recipe can name. Declarative: an entry is a `BenchmarkConfig` with its licence and a note.

Answers are asked for in words that state-of-the-art math models know (a boxed answer), and judged leniently: an
evaluation wants to know whether the answer is right, a reward must not be fooled. The token limit is the evaluation's
`max_new_tokens`, so that every benchmark can be run with a small budget; the truncation rate in the report says
whether it was enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.config.schema import (
    BenchmarkConfig,
    FileSource,
    MathVerifierConfig,
    ProceduralVerifierConfig,
    TaskSource,
)
from posttrain.errors import RecipeError, nearest

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
"""End of a prompt template; the doubled braces are literal ones."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Attributes:
    config: what is evaluated.
    licence: of the problems.
    note: what to know before reading the numbers.
    """

    config: BenchmarkConfig
    licence: str
    note: str


def _math(name: str, licence: str, note: str, /, **source: str) -> Entry:
    verifier = [MathVerifierConfig(type="math", profile="lenient")]
    return Entry(BenchmarkConfig(name=name, data=FileSource(**source), verifier=verifier), licence, note)


def _task(name: str, task: str, level: int, note: str) -> Entry:
    data = TaskSource(task=task, levels=[level], size=256, split="test")
    verifier = [ProceduralVerifierConfig(type="procedural", profile="strict")]
    return Entry(BenchmarkConfig(name=name, data=data, verifier=verifier), "none needed: made by posttrain", note)


_MATH = (
    _math(
        "gsm8k",
        "MIT",
        "1,319 grade-school word problems; wants max_new_tokens of 512 or more",
        path="openai/gsm8k",
        name="main",
        split="test",
        prompt="question",
        reference="answer",
        reference_pattern=r"####\s*(.+)$",
        template="{question}" + BOXED,
    ),
    _math(
        "svamp",
        "MIT",
        "300 one-step word problems, the test split; other papers report all 1,000",
        path="ChilleD/SVAMP",
        split="test",
        prompt="Body",
        reference="Answer",
        template="{Body} {Question}" + BOXED,
    ),
    _math(
        "math500",
        "MIT, as the MATH data set it is drawn from",
        "500 competition problems; wants max_new_tokens of 2048 or more",
        path="HuggingFaceH4/MATH-500",
        split="test",
        prompt="problem",
        reference="answer",
        template="{problem}" + BOXED,
    ),
    _math(
        "amc23",
        "none stated",
        "40 competition problems with number answers: expect intervals of 30 points; wants 2048 tokens or more",
        path="math-ai/amc23",
        split="test",
        prompt="question",
        reference="answer",
        template="{question}" + BOXED,
    ),
    _math(
        "aime24",
        "none stated",
        "30 hard competition problems: expect wide intervals; wants 4096 tokens or more; the split is called train",
        path="HuggingFaceH4/aime_2024",
        split="train",
        prompt="problem",
        reference="answer",
        template="{problem}" + BOXED,
    ),
    _math(
        "aime25",
        "see the data set's card",
        "30 hard competition problems: expect wide intervals; wants 4096 tokens or more",
        path="math-ai/aime25",
        split="test",
        prompt="problem",
        reference="answer",
        template="{problem}" + BOXED,
    ),
)

_TASKS = (
    _task("chain-sum-2", "chain_sum", 2, "sum of 2 terms; the split has about 20 prompts, so intervals are wide"),
    _task("chain-sum-3", "chain_sum", 3, "sum of 3 terms, every step checked; 136 different prompts"),
    *(_task(f"chain-sum-{n}", "chain_sum", n, f"sum of {n} terms, every step checked") for n in range(4, 13)),
    *(
        _task(f"countdown-{n}", "countdown", n, f"reach a target with {n} numbers, every step checked")
        for n in range(3, 7)
    ),
    *(
        _task(f"variable-chain-{n}", "variable_chain", n, f"a chain of {n} definitions, every step checked")
        for n in range(2, 9)
    ),
)

BENCHMARKS: dict[str, Entry] = {entry.config.name: entry for entry in (*_MATH, *_TASKS)}


def resolve(benchmarks: Sequence[str | BenchmarkConfig]) -> list[BenchmarkConfig]:
    """The benchmarks of an evaluation, names looked up.

    Raises:
        RecipeError: an unknown name, or two benchmarks of one name.
    """
    resolved: dict[str, BenchmarkConfig] = {}
    for index, benchmark in enumerate(benchmarks):
        where = f"evaluation.benchmarks.{index}"
        if isinstance(benchmark, str):
            if benchmark not in BENCHMARKS:
                raise RecipeError(f"no benchmark {benchmark!r}", where=where, hint=nearest(benchmark, BENCHMARKS))
            benchmark = BENCHMARKS[benchmark].config
        if benchmark.name in resolved:
            raise RecipeError(f"two benchmarks are called {benchmark.name!r}", where=where, hint="rename one of them")
        resolved[benchmark.name] = benchmark
    return list(resolved.values())
