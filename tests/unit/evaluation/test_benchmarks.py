"""The named benchmarks: consistent, declarative, and resolvable."""

import json
import os
import re
from pathlib import Path

import pytest

from posttrain.config.schema import BenchmarkConfig, FileSource, TaskSource, VerifierPoolConfig
from posttrain.data.sources import problems
from posttrain.data.tasks import TASKS
from posttrain.errors import RecipeError
from posttrain.evaluation.benchmarks import BENCHMARKS, resolve
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.verdict import Status

DATA = Path(os.environ.get("POSTTRAIN_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
TASK_NAMES = [name for name, entry in BENCHMARKS.items() if isinstance(entry.config.data, TaskSource)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_entry_is_complete(name: str):
    entry = BENCHMARKS[name]
    assert entry.config.name == name
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert entry.licence and entry.note
    assert BenchmarkConfig.model_validate(entry.config.model_dump()) == entry.config
    if isinstance(entry.config.data, FileSource):
        assert entry.config.data.reference
        assert "{" + entry.config.data.prompt + "}" in entry.config.data.template


@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_procedural_benchmark_can_be_made_and_its_expert_is_right(name: str):
    config = BENCHMARKS[name].config
    asked = problems(config.data.model_copy(update={"size": 8}), name)
    assert len(asked) == 8
    assert config.data.split == "test"
    judge = build_judge(config.verifier, VerifierPoolConfig(workers=0))
    traces = [TASKS[config.data.task].expert_trace(problem) for problem in asked]
    assert {judgement.status for judgement in judge.judge(asked, traces)} == {Status.CORRECT}
    judge.close()


def test_names_and_benchmarks_in_place_are_resolved_in_order():
    own = BenchmarkConfig.model_validate({"name": "own", "data": {"path": "x.jsonl"}, "verifier": [{"type": "exact"}]})
    assert [benchmark.name for benchmark in resolve(["countdown-3", own, "gsm8k"])] == ["countdown-3", "own", "gsm8k"]


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(RecipeError, match="no benchmark 'chain-summ-4'") as caught:
        resolve(["gsm8k", "chain-summ-4"])
    assert caught.value.where == "evaluation.benchmarks.1"
    assert "'chain-sum-4'" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "file", "count", "first"),
    [
        ("gsm8k", "gsm8k_test.jsonl", 1319, "18"),
        ("svamp", "svamp.jsonl", 1000, "145"),
        ("aime24", "aime24.jsonl", 30, "204"),
        ("amc23", "amc23.jsonl", 40, "27"),
    ],
)
def test_columns_and_templates_fit_the_real_files(name: str, file: str, count: int, first: str):
    if not (DATA / file).exists():
        pytest.skip(f"{file} is not here; set POSTTRAIN_TEST_DATA to a folder that has it")
    rows = [json.loads(line) for line in (DATA / file).open(encoding="utf-8")]
    config = BENCHMARKS[name].config
    hub_keys = {"path", "name", "split", "revision"}
    local = FileSource(path=str(DATA / file), **config.data.model_dump(exclude=hub_keys, exclude_unset=True))
    asked = problems(local, name)
    assert len(asked) == len(rows) == count
    assert asked[0].reference == first
    prompt = asked[0].prompt if isinstance(asked[0].prompt, str) else asked[0].prompt[-1]["content"]
    assert prompt.endswith("put your final answer within \\boxed{}.")
    assert prompt.startswith(str(rows[0][config.data.prompt])[:40])
    judge = build_judge(config.verifier, VerifierPoolConfig(workers=0))
    right = [f"So the answer is \\boxed{{{problem.reference}}}." for problem in asked[:20]]
    assert {judgement.status for judgement in judge.judge(asked[:20], right)} == {Status.CORRECT}
    assert {j.status for j in judge.judge(asked[:20], ["\\boxed{-77777}"] * 20)} == {Status.WRONG}
    judge.close()
