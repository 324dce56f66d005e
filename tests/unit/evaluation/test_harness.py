"""The bridge to lm-evaluation-harness, with the real package where it is installed."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.cli.evaluate import harness_arguments
from posttrain.config.schema import ModelConfig
from posttrain.errors import DataError, RecipeError, StackError
from posttrain.evaluation.compare import compare_reports
from posttrain.evaluation.harness import HarnessOptions, check_harness, evaluate_harness
from posttrain.evaluation.report import SCHEMA, HarnessTask, Report
from posttrain.evaluation.statistics import mean_interval, paired_test

with_package = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'posttrain[eval]'"
)

TASK = """
task: pt_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["0", "1", "2", "3", "4"]
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i}+{j}=", "answer": i + j} for i in range(3) for j in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pt_sums.yaml").write_text(TASK.format(data=data))
    return folder


@with_package
def test_a_local_task_gives_the_same_kind_of_report(tasks: Path, tiny_model: Path, tmp_path: Path):
    options = HarnessOptions(("pt_sums",), tasks)
    report = evaluate_harness(ModelConfig(path=str(tiny_model)), options, tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    (task,) = report.harness
    assert (task.name, task.version, task.other) == ("pt_sums", "1", {})
    values = task.values["acc,none"]
    assert len(values) == 9
    assert set(values) <= {0.0, 1.0}
    assert task.metrics["acc,none"] == mean_interval(values)
    assert "lm-eval" in report.versions
    again = evaluate_harness(ModelConfig(path=str(tiny_model)), options, None)
    (change,) = compare_reports(report, again).changes
    assert (change.difference.value, change.test.p) == (0.0, 1.0)


@with_package
def test_unknown_tasks_name_the_nearest(tasks: Path):
    with pytest.raises(RecipeError, match="no task 'pt_sum'") as caught:
        check_harness(HarnessOptions(("pt_sum",), tasks))
    assert "'pt_sums'" in caught.value.hint


@with_package
def test_tasks_that_run_code_are_refused(tasks: Path, tiny_model: Path):
    (tasks / "unsafe.yaml").write_text(
        (tasks / "pt_sums.yaml").read_text().replace("pt_sums", "u") + "unsafe_code: true"
    )
    with pytest.raises(RecipeError, match="without isolation"):
        evaluate_harness(ModelConfig(path=str(tiny_model)), HarnessOptions(("u",), tasks), None)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_package_the_extra_is_named():
    with pytest.raises(StackError, match="eval") as caught:
        check_harness(HarnessOptions(("x",)))
    assert caught.value.hint == "pip install 'posttrain[eval]'"


def _report(values: list[float], **keys) -> Report:
    task = HarnessTask("arc", "1", {"fewshot": 0}, "hash", {"acc,none": mean_interval(values)}, {"ppl,none": 9.0}, {})
    task = replace(task, values={"acc,none": tuple(values)}, **keys)
    return Report(SCHEMA, "model", "2030-01-01", "lm-eval", "template", {}, 1.0, (), (task,))


def test_reports_of_the_harness_are_paired_by_document():
    before, after = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    base = Report.from_json(_report(before).to_json())
    (change,) = compare_reports(base, _report(after)).changes
    assert (change.benchmark, change.metric) == ("arc", "acc,none")
    assert change.test == paired_test(before, after)
    assert change.difference.value == pytest.approx(4 / 6)


@pytest.mark.parametrize("keys", [{"version": "2"}, {"settings": {"fewshot": 5}}, {"problem_hash": "other"}])
def test_tasks_asked_otherwise_are_refused(keys: dict):
    with pytest.raises(DataError, match=f"arc: {next(iter(keys))}"):
        compare_reports(_report([0.0, 1.0]), _report([0.0, 1.0], **keys))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "arc", None, None, None, False), "--tasks has no effect"),
        ((None, None, None, None, None, True), "--chat-template has no effect"),
        (("lm-evl", "arc", None, None, None, False), "no harness 'lm-evl'"),
        (("lm-eval", " , ", None, None, None, False), "no tasks"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: tuple, message: str):
    with pytest.raises(RecipeError, match=message):
        harness_arguments(*arguments)


def test_options_become_arguments():
    assert harness_arguments(None, None, None, None, 5, False) is None
    found = harness_arguments("lm-eval", "arc_easy, gsm8k", None, 3, 5, True)
    assert HarnessOptions(**found) == HarnessOptions(("arc_easy", "gsm8k"), None, 3, 5, chat_template=True)
