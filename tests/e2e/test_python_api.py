"""The Python interface: recipes as dictionaries, rows and rewards as objects, runs read back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pandas
import pytest

import posttrain as pt
from posttrain.state.objects import written_down

DOCS = Path(__file__).parents[2] / "docs" / "python.md"


def recipe(tiny_model, out, **changes):
    return {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": {"task": "chain_sum", "levels": [2], "size": 16}},
        "verifier": [{"type": "procedural"}],
        "verifier_pool": {"workers": 1},
        "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 6},
        "method": {"name": "grpo"},
        "batch": {"prompts_per_step": 4, "micro_batch": 16},
        "training": {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3},
        "output": str(out),
    } | changes


def test_importing_is_cheap():
    heavy = "torch", "transformers", "trl", "datasets", "pydantic", "pandas"
    code = f"import posttrain, sys; print([name for name in {heavy} if name in sys.modules], dir(posttrain))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("[] ") and "'train'" in said
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = pt.trian


def test_the_program_of_the_docs(tmp_path, monkeypatch):
    """Run as a script: its reward lives in `__main__`, which no worker may run again."""
    first, second, third, _ = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "program.py").write_text(first + second + third)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\ncorrect 1.0\n" in done.stdout
    run = pt.load_run(tmp_path / "runs" / "from-python")
    assert [row["step"] for row in run.metrics if "reward" in row] == [1, 2, 3] and run.model is not None
    assert list(run.to_pandas().index) == [1, 2, 3] and run.recipe["method"]["name"] == "grpo"
    assert run.samples and {"prompt", "verdict"} <= set(run.samples[0])
    again = pt.load_recipe(run.folder / "resolved.yaml")  # stands without the program
    assert again.verifier[0].function.endswith("inputs/shorter.py:shorter")
    assert Path(again.data.prompts.path).read_text().count("\n") == 64


def test_a_run_from_a_dictionary_is_the_one_from_a_file(tiny_model, tmp_path):
    made = recipe(tiny_model, tmp_path / "one")
    before = json.dumps(made)
    result = pt.train(made, {"training.max_steps": 1})
    assert json.dumps(made) == before and result.steps == 1 and not result.stopped
    with pytest.raises(pt.PosttrainError, match="finished or interrupted run"):
        pt.train(made)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tiny_model, tmp_path / "two")))
    pt.train(tmp_path / "recipe.yaml", ["training.max_steps=1"])
    one, two = (pt.load_run(tmp_path / name) for name in ("one", "two"))
    assert [row["loss"] for row in one.metrics if "loss" in row] == [
        row["loss"] for row in two.metrics if "loss" in row
    ]


def test_evaluation_and_comparison(tiny_model, tmp_path):
    benchmark = {
        "name": "sums",
        "data": {"task": "chain_sum", "levels": [2], "size": 6, "split": "test"},
        "verifier": [{"type": "procedural"}],
    }
    keys = {"benchmarks": [benchmark], "samples": 2, "max_new_tokens": 6}
    report = pt.evaluate(tiny_model, keys, output=tmp_path / "report.json")
    assert (
        report.benchmarks[0].name == "sums" and len(report.benchmarks[0].records) + report.benchmarks[0].repeated == 6
    )
    comparison = pt.compare(report, tmp_path / "report.json")
    assert comparison.changes and all(change.base == change.other for change in comparison.changes)
    with pytest.raises(pt.PosttrainError, match="did you mean 'samples'"):
        pt.evaluate(tiny_model, keys, sample=3)


ROWS = [{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": "4"}]


@pytest.mark.parametrize(
    "source", [ROWS, {"path": ROWS, "prompt": "q"}, datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS)]
)
def test_rows_in_memory_become_a_file(tmp_path, source):
    made = written_down({"data": {"prompts": source}, "output": str(tmp_path)})
    path = Path(made["data"]["prompts"]["path"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    assert path.parent == tmp_path / "inputs"


def test_a_list_may_be_rows_or_sources(tmp_path):
    sources = [{"path": ROWS, "weight": 2.0}, {"path": "there.jsonl"}, datasets.Dataset.from_list(ROWS[:1])]
    made = written_down({"data": {"prompts": sources, "completions": ROWS}, "output": str(tmp_path)})["data"]
    assert [Path(one["path"]).name for one in made["prompts"]] == ["prompts.jsonl", "there.jsonl", "prompts-2.jsonl"]
    assert made["prompts"][0]["weight"] == 2.0 and Path(made["completions"]["path"]).name == "completions.jsonl"


def test_objects_that_cannot_be_written_down_are_named(tmp_path):
    with pytest.raises(pt.PosttrainError, match="row 1 cannot be written down"):
        written_down({"data": {"prompts": [{"q": "a"}, {"q": object()}]}, "output": str(tmp_path)})
    with pytest.raises(pt.PosttrainError, match="run's folder"):
        written_down({"data": {"prompts": [{"q": "a"}]}})


def test_functions_are_kept_by_name_or_by_value(tmp_path):
    threshold = 7

    def closure(completion):
        return len(completion) > threshold

    named = written_down({"verifier": json.dumps, "output": str(tmp_path)})["verifier"][0]["function"]
    assert named == "json:dumps"
    kept = written_down({"verifier": [closure], "output": str(tmp_path)})["verifier"][0]["function"]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'inputs')!r}); import closure as m; print(m.closure('x' * 8))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert kept.endswith("closure.py:closure") and said.strip() == "True"


def test_a_run_is_read_while_it_is_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss": 2.0}\n{"step": 2, "ti')
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"st')
    run = pt.load_run(tmp_path)
    assert run.metrics == [{"step": 1, "time": 1.0, "loss": 2.0}] and run.samples == [{"step": 1}] and run.model is None
    with pytest.raises(pt.PosttrainError, match="no metrics"):
        pt.load_run(tmp_path / "nowhere")
