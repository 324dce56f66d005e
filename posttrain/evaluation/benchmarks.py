"""The benchmarks that a recipe can name. Declarative: an entry is a `BenchmarkConfig` with its licence and a note.

Answers are asked for in words that state-of-the-art math models know (a boxed answer), and judged leniently: an
evaluation wants to know whether the answer is right, a reward must not be fooled. The token limit is the evaluation's
`max_new_tokens`, so that every benchmark can be run with a small budget; the truncation rate in the report says
whether it was enough. Code runs in the sandbox and is asked for in a code block, options by their letter.

Columns are those of the data set on the Hub. A local file with the same columns can stand in for it
(`benchmark_paths`); other columns make another benchmark, written in YAML.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import posttrain
from posttrain.config.loading import load_config
from posttrain.config.schema import (
    BenchmarkConfig,
    BenchmarkFile,
    FileSource,
    GymSource,
    Source,
    TaskSource,
)
from posttrain.errors import RecipeError, nearest
from posttrain.registry import Registry
from posttrain.verifiers.choice import ChoiceVerifier
from posttrain.verifiers.code import CodeVerifier
from posttrain.verifiers.gym import GymVerifier
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.procedural import ProceduralVerifier

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
"""End of a prompt template; the doubled braces are literal ones."""

CODE = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}```\n"
"""For HumanEval: `{prompt}` holds imports, signature and docstring."""

YAML = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Entry:
    """A benchmark that is known by its name.

    Attributes:
        config: what is evaluated.
        note: what to know before reading the numbers.
    """

    config: BenchmarkConfig
    note: str

    @property
    def licence(self) -> str:
        """Of the problems."""
        return self.config.licence or "not known"


def _math(name: str, licence: str, note: str, /, **source: str) -> Entry:
    verifier = [MathVerifier.Config(profile="lenient")]
    data = FileSource(reference="answer", **source) if "reference" not in source else FileSource(**source)
    return Entry(BenchmarkConfig(name=name, data=data, verifier=verifier, licence=licence), note)


def _code(name: str, licence: str, note: str, /, verifier: dict[str, Any], **source: str) -> Entry:
    judged_by = [CodeVerifier.Config(**verifier)]
    return Entry(BenchmarkConfig(name=name, data=FileSource(**source), verifier=judged_by, licence=licence), note)


def _gpqa(name: str, configuration: str, note: str) -> Entry:
    data = FileSource(
        path="Idavidrein/gpqa",
        name=configuration,
        split="train",
        prompt="Question",
        reference="Correct Answer",
        template="{Question}",
    )
    config = BenchmarkConfig(
        name=name,
        data=data,
        verifier=[ChoiceVerifier.Config(profile="lenient")],
        options=[f"Incorrect Answer {number}" for number in (1, 2, 3)],
        licence="CC BY 4.0",
    )
    return Entry(config, note)


def _task(name: str, task: str, level: int, note: str) -> Entry:
    data = TaskSource(task=task, levels=[level], size=256, split="test")
    verifier = [ProceduralVerifier.Config(profile="strict")]
    licence = "none needed: made by posttrain"
    return Entry(BenchmarkConfig(name=name, data=data, verifier=verifier, licence=licence), note)


def _gym(generator: str) -> Entry:
    template = "{question}\nReason step by step, and put your final answer within <answer> </answer> tags."
    config = BenchmarkConfig(
        name="gym-" + generator.replace("_", "-"),
        data=GymSource(reasoning_gym=generator, size=256, split="test", template=template),
        verifier=[GymVerifier.Config()],
        licence="Apache-2.0",
    )
    return Entry(config, f"256 problems of reasoning-gym's {generator} with its own parameters and scorer")


_MATH = (
    _math(
        "gsm8k",
        "MIT",
        "1,319 grade-school word problems; wants max_new_tokens of 512 or more",
        path="openai/gsm8k",
        name="main",
        split="test",
        prompt="question",
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
        template="{problem}" + BOXED,
    ),
    _math(
        "amc23",
        "none stated",
        "40 competition problems with number answers: expect intervals of 30 points; wants 2048 tokens or more",
        path="math-ai/amc23",
        split="test",
        prompt="question",
        template="{question}" + BOXED,
    ),
    _math(
        "aime24",
        "none stated",
        "30 hard competition problems: expect wide intervals; wants 4096 tokens or more; the split is called train",
        path="HuggingFaceH4/aime_2024",
        split="train",
        prompt="problem",
        template="{problem}" + BOXED,
    ),
    _math(
        "aime25",
        "see the data set's card",
        "30 hard competition problems: expect wide intervals; wants 4096 tokens or more",
        path="math-ai/aime25",
        split="test",
        prompt="problem",
        template="{problem}" + BOXED,
    ),
    _math(
        "minerva",
        "none stated",
        "272 undergraduate science problems with numbers, units and formulas; wants 2048 tokens or more",
        path="math-ai/minervamath",
        split="test",
        prompt="question",
        template="{question}" + BOXED,
    ),
    _math(
        "olympiadbench",
        "Apache-2.0",
        "674 olympiad problems in English, text only; the split is called train; wants 4096 tokens or more",
        path="Hothan/OlympiadBench",
        name="OE_TO_maths_en_COMP",
        split="train",
        prompt="question",
        reference="final_answer",
        template="{question}" + BOXED,
    ),
)

_CODE = (
    _code(
        "humaneval",
        "MIT",
        "164 Python functions with unit tests, run in the sandbox; wants max_new_tokens of 512 or more",
        {},
        path="openai/openai_humaneval",
        split="test",
        prompt="prompt",
        template=CODE,
    ),
    _code(
        "mbpp",
        "CC BY 4.0",
        "500 Python functions with three asserts each, which the prompt shows; wants max_new_tokens of 512 or more",
        {"test": "test_list", "context": None},
        path="google-research-datasets/mbpp",
        name="full",
        split="test",
        prompt="text",
        template="{text}\nAnswer with one Python code block. The code must pass these tests:\n{test_list}\n",
    ),
)

_CHOICE = (
    _gpqa("gpqa", "gpqa_main", "448 graduate science questions, four options; access must be asked for on the Hub"),
    _gpqa(
        "gpqa-diamond", "gpqa_diamond", "the 198 best checked questions of GPQA; access must be asked for on the Hub"
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

_GYM = tuple(
    map(_gym, ("chain_sum", "countdown", "gsm_symbolic", "simple_equations", "family_relationships", "knights_knaves"))
)

ENTRIES = (*_MATH, *_CODE, *_CHOICE, *_TASKS, *_GYM)
BENCHMARKS = Registry("benchmark", {entry.config.name: entry for entry in ENTRIES})


def register(config: BenchmarkConfig, note: str = "") -> BenchmarkConfig:
    """Make a benchmark of a plugin known by its name, beside those that a YAML file holds.

    Args:
        config: problems and the verifiers that judge answers to them.
        note: what to know before reading the numbers, for `posttrain eval --list`.

    Raises:
        PluginError: the name is taken.
    """
    BENCHMARKS.add(config.name, Entry(config, note))
    return config


def resolve(
    benchmarks: Sequence[str | BenchmarkConfig], paths: Mapping[str, str] | None = None
) -> list[BenchmarkConfig]:
    """The benchmarks of an evaluation: names looked up, YAML files read, local files in place of the Hub.

    Args:
        benchmarks: names, YAML files, or benchmarks in place.
        paths: `benchmark_paths`: name of a benchmark -> local file or folder with the same columns.

    Raises:
        RecipeError: an unknown name, a YAML file that is none of benchmarks, two benchmarks of one name, or a path
            for a benchmark that is not evaluated or does not come from a file.
    """
    resolved: dict[str, BenchmarkConfig] = {}
    for index, benchmark in enumerate(benchmarks):
        where = f"evaluation.benchmarks.{index}"
        for each in _expanded(benchmark, where):
            if each.name in resolved:
                raise RecipeError(f"two benchmarks are called {each.name!r}", where=where, hint="rename one of them")
            resolved[each.name] = each
    for name, path in (paths or {}).items():
        where = f"evaluation.benchmark_paths.{name}"
        if name not in resolved:
            raise RecipeError(f"{name!r} is not evaluated here", where=where, hint=nearest(name, resolved))
        resolved[name] = _from_path(resolved[name], path, where)
    return list(resolved.values())


def revision(source: Source) -> str | None:
    """Which version of the problems this is.

    Returns:
        The commit of a Hub data set, the SHA-256 of a local file, the version of the package that makes the problems;
        None for a folder, and for a cached data set of unknown commit.
    """
    if isinstance(source, TaskSource):
        return f"posttrain {posttrain.__version__}"
    if isinstance(source, GymSource):
        return f"reasoning-gym {version('reasoning-gym')}"
    from posttrain.data import hub
    from posttrain.data.sources import is_local

    if not is_local(source.path):
        return hub.commit(source.path, source.name, revision=source.revision)
    path = Path(source.path).expanduser()
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _expanded(benchmark: str | BenchmarkConfig, where: str) -> Sequence[BenchmarkConfig]:
    if isinstance(benchmark, BenchmarkConfig):
        return [benchmark]
    if benchmark.endswith(YAML):
        return load_config(benchmark, BenchmarkFile).benchmarks
    if benchmark not in BENCHMARKS:
        hint = nearest(benchmark, BENCHMARKS)
        raise RecipeError(f"no benchmark {benchmark!r}", where=where, hint=hint)
    return [BENCHMARKS[benchmark].config]


def _from_path(benchmark: BenchmarkConfig, path: str, where: str) -> BenchmarkConfig:
    if not isinstance(benchmark.data, FileSource):
        raise RecipeError(f"the problems of {benchmark.name!r} are generated, not read from a file", where=where)
    kept = benchmark.data.model_dump(exclude={"path", "name", "revision", "split"}, exclude_unset=True)
    # A folder may hold files of several splits; of a file the split says nothing.
    split = {"split": benchmark.data.split} if Path(path).expanduser().is_dir() else {}
    return benchmark.model_copy(update={"data": FileSource(path=path, **kept, **split)})
