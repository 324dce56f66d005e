"""The named benchmarks: consistent, declarative, and resolvable."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from posttrain.config.schema import BenchmarkConfig, FileSource, TaskSource, VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.data.tasks import TASKS
from posttrain.errors import DataError, RecipeError, StackError
from posttrain.evaluation.benchmarks import BENCHMARKS, resolve, revision
from posttrain.evaluation.choices import with_options
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
        # Code is judged by unit tests in a column of their own.
        assert entry.config.data.reference or entry.config.verifier[0].type == "code"
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


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("gym-")])
def test_every_reasoning_gym_benchmark_can_be_made_and_its_own_answers_are_right(name: str):
    config = BENCHMARKS[name].config
    asked = problems(config.data.model_copy(update={"size": 4}), name)
    judge = build_judge(config.verifier, VerifierPoolConfig(workers=0))
    answers = [f"<answer>{problem.meta['entry']['answer']}</answer>" for problem in asked]
    solved = [problem.meta["entry"]["answer"] is not None for problem in asked]
    verdicts = judge.judge(asked, [answer for answer in answers])
    assert all(verdict.status is Status.CORRECT for verdict, known in zip(verdicts, solved, strict=True) if known)
    assert all("<answer>" in problem.prompt for problem in asked)
    judge.close()


def _file(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = {
    "math500": ({"problem": "1+1?", "answer": "2"}, "\\boxed{2}", "\\boxed{3}"),
    "minerva": ({"question": "1+1?", "answer": "2"}, "\\boxed{2}", "\\boxed{3}"),
    "olympiadbench": ({"question": "roots?", "final_answer": ["$1,2$"]}, "\\boxed{1,2}", "\\boxed{3}"),
    "mbpp": (
        {"text": "Write double.", "code": "x", "test_list": ["assert double(2) == 4", "assert double(0) == 0"]},
        "```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return x\n```",
    ),
    "gpqa": (
        {"Question": "Which?", "Correct Answer": "right", **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}},
        "right",
        "wrong 2",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_local_file_with_the_hubs_columns_stands_in_for_it(name: str, tmp_path: Path):
    row, right, wrong = ROWS[name]
    (config,) = resolve([name], {name: str(_file(tmp_path, "rows.jsonl", [row]))})
    assert config.verifier == BENCHMARKS[name].config.verifier
    problem = problems(config.data, name)[0]
    if config.options:
        problem = with_options(problem, config.options)
        right, wrong = (f"\\boxed{{{'ABCD'[problem.meta['choices'].index(text)]}}}" for text in (right, wrong))
    judge = _judge_or_skip(config)
    assert [found.status for found in judge.judge([problem] * 2, [right, wrong])] == [Status.CORRECT, Status.WRONG]
    judge.close()


def _judge_or_skip(config: BenchmarkConfig):
    try:
        return build_judge(config.verifier, VerifierPoolConfig(workers=0))
    except StackError as error:
        pytest.skip(f"no sandbox here: {error.what}")


def test_humaneval_solutions_pass_and_empty_bodies_fail():
    if not (DATA / "humaneval.jsonl.gz").exists():
        pytest.skip("humaneval.jsonl.gz is not here; set POSTTRAIN_TEST_DATA to a folder that has it")
    (config,) = resolve(["humaneval"], {"humaneval": str(DATA / "humaneval.jsonl.gz")})
    asked = problems(config.data, "humaneval")[:3]
    judge = _judge_or_skip(config)
    written = [problem.meta["prompt"] + problem.meta["canonical_solution"] for problem in asked]
    empty = [problem.meta["prompt"] + "    pass\n" for problem in asked]
    verdicts = judge.judge([*asked, *asked], [f"Here:\n```python\n{code}```" for code in (*written, *empty)])
    assert [verdict.status for verdict in verdicts] == [Status.CORRECT] * 3 + [Status.WRONG] * 3
    judge.close()


YAML = """
benchmarks:
  - name: minerva-local
    licence: unknown
    data:
      path: {path}
      prompt: problem
      reference: solution
      template: "{{problem}}\\nPut your final answer within \\\\boxed{{{{}}}}."
    verifier: [{{type: math, profile: lenient}}]
"""


def test_own_benchmarks_come_from_yaml(tmp_path: Path):
    data = _file(tmp_path, "rows.jsonl", [{"problem": "1+1?", "solution": "It is \\boxed{2}."}])
    path = tmp_path / "my.yaml"
    path.write_text(YAML.format(path=data))
    first, second = resolve(["chain-sum-3", str(path)])
    assert (first.name, second.name, second.licence) == ("chain-sum-3", "minerva-local", "unknown")
    (problem,) = problems(second.data, second.name)
    assert problem.prompt.endswith("\\boxed{}.")
    path.write_text("benchmarks: [{name: x}]")
    with pytest.raises(RecipeError, match=r"data|verifier"):
        resolve([str(path)])


@pytest.mark.parametrize(
    ("names", "paths", "message"),
    [
        (["gsm8k"], {"gsm8": "x.jsonl"}, "'gsm8' is not evaluated here"),
        (["chain-sum-3"], {"chain-sum-3": "x.jsonl"}, "generated, not read"),
    ],
)
def test_paths_that_replace_nothing_are_refused(names: list[str], paths: dict[str, str], message: str):
    with pytest.raises(RecipeError, match=message):
        resolve(names, paths)


def test_of_a_folder_only_the_files_of_the_split_are_read(tmp_path: Path):
    for split in ("train", "test"):
        _file(tmp_path, f"{split}.jsonl", [{"question": f"{split}?", "answer": "#### 1"}])
    (config,) = resolve(["gsm8k"], {"gsm8k": str(tmp_path)})
    assert [problem.prompt[:5] for problem in problems(config.data, "gsm8k")] == ["test?"]


def test_the_revision_of_a_local_file_is_its_content(tmp_path: Path):
    path = _file(tmp_path, "rows.jsonl", [{"prompt": "1"}])
    before = revision(FileSource(path=str(path)))
    assert before == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    _file(tmp_path, "rows.jsonl", [{"prompt": "2"}])
    assert revision(FileSource(path=str(path))) != before
    assert revision(FileSource(path=str(tmp_path))) is None
    assert revision(BENCHMARKS["chain-sum-3"].config.data).startswith("posttrain ")
    assert revision(BENCHMARKS["gym-countdown"].config.data).startswith("reasoning-gym ")


def test_options_are_shuffled_the_same_way_every_time_and_not_always_alike():
    rows = [Problem(f"q/{i}", f"Which is {i}?", f"{i}", {"a": "x", "b": "y", "c": "z"}) for i in range(60)]
    first, again = ([with_options(row, ["a", "b", "c"]) for row in rows] for _ in range(2))
    assert first == again
    letters = Counter(problem.reference for problem in first)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 30
    problem = first[0]
    assert problem.meta["choices"]["ABCD".index(problem.reference)] == "0"
    assert f"\n{problem.reference}. 0\n" in problem.prompt


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem("q", "Which?", "x", {"a": "x"}), "two options are equal"),
        (Problem("q", "Which?", None, {"a": "x"}), "no reference"),
        (Problem("q", "Which?", "y", {"b": "x"}), "no text in column 'a'"),
        (Problem("q", ({"role": "user", "content": "Which?"},), "y", {"a": "x"}), "chat messages"),
    ],
)
def test_options_that_cannot_be_asked_are_errors(problem: Problem, message: str):
    with pytest.raises(DataError, match=message):
        with_options(problem, ["a"])


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
    local = resolve([name], {name: str(DATA / file)})[0].data
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
