"""Plugins of a stranger: a method, a task, a verifier, a reader, a metric and a callback in files of their own."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config import plugins
from posttrain.config.loading import load_recipe
from posttrain.data.files import read_rows
from posttrain.data.tasks import TASKS
from posttrain.errors import DataError, PluginError, RecipeError
from posttrain.methods import CONFIGS

METHOD = '''
from typing import Literal

from pydantic import Field
from transformers import TrainerCallback

from posttrain.methods import register
from posttrain.methods.sft import SFT
from posttrain.config.metric import Metric
from posttrain.tracking import metrics
from posttrain.trainers import callbacks


@register
class Scaled(SFT):
    """Supervised fine-tuning with a scaled loss."""

    paper = "a stranger's"
    metrics = (Metric("stranger/own", "The loss, said by its class.", "nats", healthy=(0.0, 1e6)),)

    class Config(SFT.Config):
        name: Literal["scaled_sft"] = "scaled_sft"
        scale: float = Field(2.0, gt=0, description="factor of the loss")

    def loss(self, batch):
        terms = super().loss(batch)
        for term in terms.values():
            term.diagnostics["stranger/declared"] = (term.value.detach(), term.count)
            term.diagnostics["stranger/own"] = (term.value.detach(), term.count)
            term.diagnostics["stranger/undeclared"] = (term.value.detach(), term.count)
        return terms


metrics.register(metrics.Metric("stranger/declared", "The loss once more.", "nats"))


@callbacks.register
class Notes(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        with open(f"{args.output_dir}.notes", "a") as file:
            file.write(f"{state.global_step}\\n")
'''

TASK = '''
import random

from posttrain.data.sample import Problem
from posttrain.data.tasks import register
from posttrain.verifiers.verdict import Status, Verdict


class Next:
    """Which digit comes next?"""

    name, levels = "next_digit", range(1, 4)

    def problem(self, rng, level):
        first = rng.randrange(9)
        prompt = "".join(str((first + n) % 10) for n in range(level)) + f"+{rng.randrange(100)}="
        return Problem("", prompt, str((first + level) % 10), {"task": self.name, "level": level})

    def split_key(self, problem):
        return problem.prompt

    def expert_trace(self, problem):
        return problem.reference

    def weak_trace(self, problem, rng, weakness):
        return str(rng.randrange(10))

    def check_strict(self, problem, completion):
        right = completion == problem.reference
        return Verdict(Status.CORRECT if right else Status.WRONG, float(right))

    check_lenient = check_strict


register(Next())
'''


@pytest.fixture
def stranger(tiny_model, tmp_path, plugins_forgotten):
    """A folder with plugins and recipes."""
    (tmp_path / "scaled.py").write_text(METHOD)
    (tmp_path / "digits.py").write_text(TASK)
    common = {
        "model": {"path": str(tiny_model)},
        "training": {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3},
        "output": str(tmp_path / "run"),
    }
    supervised = common | {
        "plugins": ["scaled.py", "digits.py"],
        "data": {"completions": {"task": "next_digit", "levels": [1, 2], "size": 32}},
        "method": {"name": "scaled_sft", "scale": 3.0},
        "batch": {"rows_per_step": 8, "micro_batch": 8},
    }
    online = common | {
        "plugins": ["digits.py"],
        "data": {"prompts": {"task": "next_digit", "levels": [1, 2], "size": 32}},
        "verifier": [{"type": "procedural"}],
        "method": {"name": "grpo"},
        "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 4},
        "batch": {"prompts_per_step": 4, "micro_batch": 16},
        "output": str(tmp_path / "online"),
    }
    for name, recipe in (("supervised", supervised), ("online", online)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_a_method_a_task_a_metric_and_a_callback(stranger, caplog):
    said = run("check", stranger / "supervised.yaml", "--run-code")
    assert "(--run-code)" in said and "scaled.py (sha256" in said and "digits.py (sha256" in said
    run("train", stranger / "supervised.yaml")
    rows = [json.loads(line) for line in (stranger / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    assert all(row["stranger/declared"] == row["stranger/undeclared"] == row["stranger/own"] for row in logged)
    assert len(logged) == 2
    assert sum("'stranger/undeclared'" in record.getMessage() for record in caplog.records) == 1
    said = [record.getMessage() for record in caplog.records]
    assert not any(name in text for text in said for name in ("'stranger/declared'", "'stranger/own'"))
    assert (stranger / "run" / "checkpoints.notes").read_text().split() == ["1", "2"]
    resolved = yaml.safe_load((stranger / "run" / "resolved.yaml").read_text())
    assert resolved["plugins"] == [str(stranger / "scaled.py"), str(stranger / "digits.py")]

    (stranger / "digits.py").write_text(TASK + "\n# changed\n")
    again = ["training.max_steps=3", "--resume", "auto", "--allow-changed", "training.max_steps"]
    result = CliRunner().invoke(app, ["train", str(stranger / "supervised.yaml"), *again])
    assert "content.code" in str(result.exception)


def test_workers_know_the_task_too(stranger):
    run("train", stranger / "online.yaml")
    rows = [json.loads(line) for line in (stranger / "online" / "metrics.jsonl").read_text().splitlines()]
    assert any("reward" in row for row in rows) and all(row.get("unknown_share", 0.0) == 0.0 for row in rows)


def test_plugins_of_the_command_line_are_known_to_every_command(stranger, apart):
    process = apart(
        ["-m", "posttrain", "--plugin", stranger / "scaled.py", "methods", "scaled_sft"], stranger / "shown"
    )
    process.join(120)
    shown = (stranger / "shown").read_text()
    assert process.exitcode == 0 and "factor of the loss" in shown, shown


def test_a_plugin_of_an_installed_package(stranger, monkeypatch):
    from importlib.metadata import EntryPoint

    monkeypatch.syspath_prepend(stranger)
    (stranger / "installed_digits.py").write_text(TASK.replace("next_digit", "installed_digit"))
    entry = EntryPoint("digits", "installed_digits", plugins.GROUP)
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: [entry])
    plugins._load_installed.cache_clear()
    try:
        plugins.load_plugins((), where="here")
        assert "installed_digit" in TASKS
    finally:
        plugins._load_installed.cache_clear()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_like_it\n", "No module named 'nothing_like_it' (bad.py, line 1)"),
        ("x = 1\n\nraise ValueError('no')\n", "ValueError: no (bad.py, line 3)"),
        (METHOD.replace('"scaled_sft"', '"sft"'), "there is a method 'sft' already"),
        (TASK.replace("next_digit", "countdown"), "there is a task 'countdown' already"),
        ("from posttrain.methods import register\n@register\nclass M: pass\n", "has no name"),
    ],
)
def test_mistakes_name_the_plugin(stranger, text, said):
    (stranger / "bad.py").write_text(text)
    recipe = yaml.safe_load((stranger / "online.yaml").read_text()) | {"plugins": ["bad.py"]}
    (stranger / "bad.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(PluginError) as caught:
        load_recipe(stranger / "bad.yaml", [], CONFIGS)
    assert said in str(caught.value) and "bad.yaml:" in str(caught.value) and "bad.py" in str(caught.value)


def test_a_name_that_no_plugin_registers(stranger):
    recipe = yaml.safe_load((stranger / "supervised.yaml").read_text()) | {"plugins": ["digits.py"]}
    (stranger / "without.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="unknown method 'scaled_sft'"):
        load_recipe(stranger / "without.yaml", [], CONFIGS)
    with pytest.raises(PluginError, match="did you mean 'digits.py'"):
        load_recipe(stranger / "without.yaml", ["plugins=[digit.py]"], CONFIGS)


def test_the_method_of_the_docs_trains(stranger):
    text = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    (stranger / "focal.py").write_text(text.split("```python\n")[1].split("```")[0])
    recipe = yaml.safe_load((stranger / "supervised.yaml").read_text())
    recipe |= {"plugins": ["focal.py", "digits.py"], "method": {"name": "focal_sft"}}
    (stranger / "focal.yaml").write_text(yaml.safe_dump(recipe))
    run("train", stranger / "focal.yaml")
    assert (stranger / "run" / "model" / "model.safetensors").exists()


BENCHMARK = """
from posttrain.config.schema import BenchmarkConfig
from posttrain.evaluation.benchmarks import register

register(
    BenchmarkConfig(
        name="next-digit",
        data={"task": "next_digit", "levels": [1], "size": 8, "split": "test"},
        verifier=[{"type": "procedural"}],
    ),
    note="which digit comes next",
)
"""


def test_a_benchmark(stranger, tiny_model):
    (stranger / "bench.py").write_text(BENCHMARK)
    plugin = ("--plugin", stranger / "digits.py", "--plugin", stranger / "bench.py")
    assert "which digit comes next" in run(*plugin, "eval", "--list")
    run("eval", tiny_model, "--benchmarks", "next-digit", "--max-new-tokens", "4", "--output", stranger / "report.json")
    (report,) = json.loads((stranger / "report.json").read_text())["benchmarks"]
    assert report["name"] == "next-digit" and len(report["records"]) + report["repeated"] == 8
    (stranger / "twice.py").write_text(BENCHMARK.replace("next-digit", "gsm8k"))
    result = CliRunner().invoke(app, ["--plugin", str(stranger / "twice.py"), "methods"])
    assert result.exit_code == 1 and "there is a benchmark 'gsm8k' already" in str(result.exception)


JUDGING = """
import sqlite3
from contextlib import closing
from typing import ClassVar, Literal

from pydantic import Field

from posttrain.config.verifier import VerifierConfig
from posttrain.data import readers
from posttrain.verifiers import register
from posttrain.verifiers.verdict import Status, Verdict


@readers.register(".sqlite")
def tables(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        yield from map(dict, connection.execute("select * from problems"))


@register
class Nearest:
    \"\"\"Correct where the number is within a distance of the reference.\"\"\"

    name = "nearest"
    outcome = True

    class Config(VerifierConfig):
        \"\"\"Numbers that are near enough.\"\"\"

        type: Literal["nearest"] = "nearest"
        within: int = Field(1, ge=0, description="distance that is right still")
        needs_reference: ClassVar[bool] = True

        def gold(self, problem):
            return problem.reference

        def spoilt(self, problem, completion):
            return [("too far", str(int(completion) + self.within + 1))]

    def __init__(self, config):
        self.within = config.within

    def __call__(self, problem, completion, /):
        if not completion.isdecimal() or not completion.isascii():
            return Verdict(Status.NO_ANSWER, 0.0)
        right = abs(int(completion) - int(problem.reference)) <= self.within
        return Verdict(Status.CORRECT if right else Status.WRONG, float(right))
"""


@pytest.fixture
def judged(stranger):
    """A recipe whose problems and verdicts are a plugin's."""
    import sqlite3
    from contextlib import closing

    (stranger / "judging.py").write_text(JUDGING)
    with closing(sqlite3.connect(stranger / "problems.sqlite")) as connection:
        connection.execute("create table problems (question text, answer text)")
        rows = [(f"{one}+{two}=", str(one + two)) for one in range(4) for two in range(4)]
        connection.executemany("insert into problems values (?, ?)", rows)
        connection.commit()
    recipe = yaml.safe_load((stranger / "online.yaml").read_text()) | {
        "plugins": ["judging.py"],
        "data": {
            "prompts": {"path": str(stranger / "problems.sqlite"), "prompt": "question", "reference": "answer"},
        },
        "verifier": [{"type": "nearest", "within": 2}],
        "evaluation": {
            "every": 2,
            "max_new_tokens": 4,
            "benchmarks": [
                {
                    "name": "near",
                    "data": {"path": str(stranger / "problems.sqlite"), "prompt": "question", "reference": "answer"},
                    "verifier": [{"type": "nearest"}],
                }
            ],
        },
    }
    (stranger / "judged.yaml").write_text(yaml.safe_dump(recipe))
    return stranger


def test_a_verifier_and_a_reader(judged):
    """In every command that judges: check, train with its workers and evaluation, eval of the run, verify, replay."""
    assert "1 more errors" not in run("check", judged / "judged.yaml", "--run-code")
    run("train", judged / "judged.yaml")
    resolved = yaml.safe_load((judged / "online" / "resolved.yaml").read_text())
    assert resolved["verifier"] == [{"weight": 1.0, "gate": False, "type": "nearest", "within": 2}]
    samples = [json.loads(line) for line in (judged / "online" / "samples.jsonl").read_text().splitlines()]
    assert {sample["verdict"] for sample in samples} <= {"correct", "wrong", "no_answer"}
    rows = [json.loads(line) for line in (judged / "online" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/near/greedy" in row for row in rows)
    said = run("verify", judged / "judged.yaml")
    assert "too far" in said and "16 of 16" in said.replace("16/16", "16 of 16")
    assert "distance that is right still" in run("--plugin", judged / "judging.py", "keys", "verifier")
    run("replay", judged / "online", "--step", "1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (JUDGING.replace('"nearest"', '"math"'), "there is a verifier 'math' already"),
        (JUDGING.replace('type: Literal["nearest"] = "nearest"', "kind: int = 1"), "verifier Nearest has no type"),
        (JUDGING.replace(".sqlite", ".csv"), "files that end in .csv can be read already"),
        (JUDGING.replace(".sqlite", "sqlite"), "'sqlite' is no ending of files"),
    ],
)
def test_mistakes_of_verifiers_and_readers_name_the_plugin(judged, text, said):
    (judged / "judging.py").write_text(text)
    with pytest.raises(PluginError) as caught:
        load_recipe(judged / "judged.yaml", [], CONFIGS)
    assert said in str(caught.value) and "judging.py" in str(caught.value)


def test_keys_of_a_verifier_are_checked_and_hinted_at(judged):
    with pytest.raises(RecipeError, match=r"unknown type 'nearest'(.|\n)*--run-code"):
        load_recipe(judged / "judged.yaml", ["verifier=[{type: nearest}]"], CONFIGS, run_plugins=False)
    with pytest.raises(RecipeError, match=r"verifier.0.withn: unknown key\n  did you mean 'within'"):
        load_recipe(judged / "judged.yaml", ["verifier=[{type: nearest, withn: 2}]"], CONFIGS)
    with pytest.raises(RecipeError, match="must be at least 0, got -1"):
        load_recipe(judged / "judged.yaml", ["verifier=[{type: nearest, within: -1}]"], CONFIGS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("yield 3", "gave a int, not an object with columns"),
        (
            'raise RuntimeError("locked")',
            r"the reader of .sqlite failed: RuntimeError: locked \(judging.py, line 1\d\)",
        ),
        ("yield from ()", "the file has no rows"),
    ],
)
def test_a_reader_that_fails_names_file_and_line(judged, rows, said):
    (judged / "judging.py").write_text(JUDGING.replace("yield from map(dict,", f"{rows}; map(dict,"))
    plugins.load_plugins([str(judged / "judging.py")], where="here")
    with pytest.raises(DataError, match=said):
        read_rows(judged / "problems.sqlite")
