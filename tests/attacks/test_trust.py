"""`posttrain check` says what a recipe would have one trust, and runs none of its code by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config import plugins
from posttrain.config.own_code import find
from posttrain.config.schema import Recipe, TrainingConfig

BOOM = "import pathlib\npathlib.Path({mark!r}).touch()\n"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a recipe with changes; `mark` is a file that its code would make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = list(plugins.loaded)
    boom = BOOM.format(mark=str(tmp_path / "mark"))
    (tmp_path / "evil.py").write_text(boom + "def score(completion): return 1.0\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(boom)
    (tmp_path / "package" / "rewards.py").write_text(boom + "def score(completion): return 1.0\n")
    base = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": {"task": "chain_sum", "levels": [2], "size": 8}},
        "verifier": [{"type": "procedural"}],
        "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 4},
        "method": {"name": "grpo"},
        "batch": {"prompts_per_step": 4, "micro_batch": 4},
        "training": {"max_steps": 1},
        "output": str(tmp_path / "run"),
    }

    def write(**changes: object) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(base | changes))
        return path

    yield write
    plugins.loaded[:] = before


def check(path: Path, *options: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["check", str(path), *options])
    assert result.exit_code == code, (result.output, result.exception)
    return f"{result.output}\n{result.exception}"


def test_a_plugin_is_announced_and_not_run(recipe, tmp_path: Path) -> None:
    said = check(recipe(plugins=["evil.py"]))
    assert "evil.py (sha256" in said and "no code of it runs here" in said
    assert not (tmp_path / "mark").exists()
    said = check(recipe(plugins=["evil.py"], method={"name": "of_the_plugin"}), code=1)
    assert "unknown method" in said and "were not loaded" in said and "--run-code" in said
    check(recipe(plugins=["package.rewards"]))
    assert not (tmp_path / "mark").exists()
    check(recipe(plugins=["evil.py"]), "--run-code")
    assert (tmp_path / "mark").exists()


def test_other_commands_that_only_read_a_recipe_run_no_plugin(recipe, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "reference": "2"}) + "\n")
    path = recipe(plugins=["evil.py"], data={"prompts": {"path": str(tmp_path / "rows.jsonl")}})
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("function", ["evil.py:score", "package.rewards:score"])
def test_a_reward_function_is_announced_and_nothing_around_it_imported(function: str, recipe, tmp_path: Path) -> None:
    said = check(recipe(verifier=[{"type": "python", "function": function}]))
    assert "verifier.python" in said and ":score (sha256" in said
    assert not (tmp_path / "mark").exists()


def test_modules_are_found_without_importing(recipe, tmp_path: Path) -> None:
    from posttrain.config.own_code import module_spec

    assert find("package.rewards:score").file == tmp_path / "package" / "rewards.py"
    assert module_spec("package.nothing") is None and module_spec("evil.inner") is None
    assert module_spec("os.path.more") is None and module_spec("no_such_package.inner") is None
    assert find("xml.dom.minidom:parse").file is not None
    assert not (tmp_path / "mark").exists()


def test_code_of_the_models_repository_is_announced_and_not_run(recipe, tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        data = json.loads((tiny_model / name).read_text())
        if name != "tokenizer.json":
            data["auto_map"] = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        if name == "tokenizer_config.json":
            data["tokenizer_class"] = "Tokenizer"
        if name == "config.json":
            data["model_type"] = "of_its_own"
        (folder / name).write_text(json.dumps(data))
    (folder / "evil.py").write_text(BOOM.format(mark=str(tmp_path / "mark")))
    path = recipe(model={"path": str(folder), "trust_remote_code": True})
    said = check(path)
    assert "runs the Python code in the repository of" in said and "not checked: the tokenizer" in said
    assert not (tmp_path / "mark").exists()


def test_a_first_batch_needs_the_code(recipe, tmp_path: Path) -> None:
    said = check(recipe(plugins=["evil.py"]), "--batch", code=1)
    assert "add --run-code" in said and not (tmp_path / "mark").exists()


def test_who_is_sent_what(load) -> None:
    judge = {"type": "judge", "endpoint": "http://judge.example/v1", "model": "m", "principles": ["Right."]}
    shaping = [{"type": "procedural"}, judge | {"outcome": False, "api_key_env": "JUDGE_KEY"}]
    away = {"verifier": shaping, "rollouts.engine": "vllm", "rollouts.mode": "server"}
    away |= {"rollouts.vllm": {"url": "http://10.0.0.9:8000"}}
    assert told(load({"name": "grpo"}, away)) == {
        "verifier.judge": "sends problems, references and completions to http://judge.example/v1, with the key in "
        "$JUDGE_KEY, which others on the way can read",
        "rollouts.vllm": "sends prompts to http://10.0.0.9:8000, which others on the way can read",
    }
    local = [{"type": "procedural"}, judge | {"outcome": False, "endpoint": "http://127.0.0.1:8000/v1"}]
    here = away | {"verifier": local, "rollouts.vllm": {"url": "http://localhost:8000"}}
    assert told(load({"name": "grpo"}, here)) == {}


def told(recipe: Recipe) -> dict[str, str]:
    from posttrain.config.trust import trusted

    return {each.key: each.what for each in trusted(recipe, Path())}


def test_code_of_the_model_without_a_sandbox(load) -> None:
    said = told(load({"name": "grpo"}, {"verifier": [{"type": "code", "isolation": "rlimit"}]}))
    assert "for it has no sandbox" in said["verifier.code.isolation"]
    assert told(load({"name": "grpo"}, {"verifier": [{"type": "code"}]})) == {}


def test_nobody_is_asked_at_the_terminal_to_run_code(tmp_path: Path, tiny_model: Path, monkeypatch) -> None:
    """transformers asks where it is not told; a `y` that was meant for another question ran the repository's code."""
    from posttrain.cli.export import export_command
    from posttrain.errors import PosttrainError
    from posttrain.evaluation.reward_rows import _reader
    from posttrain.verifiers.reward_model import RewardModelVerifier, load_scorer

    def asked(*_: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "evil.py").write_text(BOOM.format(mark=str(tmp_path / "mark")))
    config = json.loads((folder / "config.json").read_text())
    code = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config | code))
    for use in (
        lambda: export_command(str(folder), tmp_path / "out", None, False, "5GB"),
        lambda: load_scorer(RewardModelVerifier.Config(type="reward_model", path=str(folder))),
        lambda: _reader("implicit.model", str(folder)),
    ):
        with pytest.raises(PosttrainError):
            use()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("in_a_file", [False, True])
def test_verifiers_of_benchmarks_are_announced(in_a_file: bool, recipe, tmp_path: Path) -> None:
    judge = {"type": "judge", "endpoint": "http://judge.example/v1", "model": "m", "principles": ["Right."]}
    beside = [judge | {"outcome": False}]
    data = {"task": "chain_sum", "levels": [2], "size": 2, "split": "test"}
    written: list[dict] = [
        {"name": "mine", "data": data, "verifier": [{"type": "python", "function": "evil.py:score"}, *beside]},
        {"name": "code", "data": data, "verifier": [{"type": "code", "isolation": "rlimit"}]},
    ]
    if in_a_file:
        (tmp_path / "bench.yaml").write_text(yaml.safe_dump({"benchmarks": written}))
    evaluation = {"every": 1, "benchmarks": ["bench.yaml"] if in_a_file else written}
    path = recipe(evaluation=evaluation)
    from posttrain.config.loading import load_recipe
    from posttrain.config.trust import trusted
    from posttrain.methods import CONFIGS

    found = trusted(load_recipe(path, [], CONFIGS), tmp_path)
    assert [each.what.split(" (")[0] for each in found] == [
        f"runs {tmp_path / 'evil.py'}:score",
        "runs the code that the model writes with this user's files and network, for it has no sandbox",
        "sends problems, references and completions to http://judge.example/v1, which others on the way can read",
    ]
    assert found[0].code and not (tmp_path / "mark").exists()


HARMLESS = {
    # words, patterns, columns of the data, and names of models, whose code is never run here
    "type", "pattern", "options", "letters", "test", "entry_point", "context", "cases", "checker", "separator",
    "path", "revision", "device", "model", "principles", "cache", "columns", "actions",
    "qualities", "negated", "template",
}  # fmt: skip
"""Fields of texts in sections of verifiers and environments that name no code and nobody who is sent anything."""

ANNOUNCED = {"function", "factory", "functions", "grade", "id", "endpoint", "api_key_env"}
"""Those that the walk tells about."""


def _texts(annotation: Any) -> bool:
    return annotation is str or any(_texts(inner) for inner in get_args(annotation) if not isinstance(inner, str))


def test_a_new_text_of_a_verifier_or_an_environment_is_looked_at() -> None:
    """Whoever adds a field that names code or an address has the walk tell about it; others are named here."""
    from posttrain.config.environment import EnvironmentConfig
    from posttrain.config.registered import sections_of
    from posttrain.config.verifier import VerifierConfig

    sections = [*sections_of(VerifierConfig), *sections_of(EnvironmentConfig)]
    texts = {name for each in sections for name, info in each.model_fields.items() if _texts(info.annotation)}
    assert texts <= HARMLESS | ANNOUNCED and texts >= ANNOUNCED


def _roots() -> dict[str, type[BaseModel]]:
    from posttrain.config.audit import AuditConfig
    from posttrain.config.collection import SampleConfig, StepLabelConfig, TakeInConfig
    from posttrain.config.schema import BenchmarkFile
    from posttrain.config.workers import EvaluationRun
    from posttrain.pipeline.schema import pipeline_schema
    from posttrain.pipeline.stages import STAGES
    from posttrain.study.schema import StudyConfig

    files = [Recipe, BenchmarkFile, EvaluationRun, SampleConfig, TakeInConfig, StepLabelConfig, AuditConfig]
    return {each.__name__: each for each in [*files, StudyConfig, pipeline_schema(STAGES)]}


@pytest.mark.parametrize("root", sorted(_roots()))
def test_no_place_of_a_file_hides_a_verifier_an_environment_or_a_models_code(root: str, recipe, tmp_path: Path) -> None:
    from posttrain.config import known
    from posttrain.config.schema import ModelConfig
    from posttrain.config.trust import trusted
    from posttrain.config.verifier import VerifierConfig
    from posttrain.environments.gymnasium import GymnasiumText
    from posttrain.verifiers.python import PythonVerifier

    dangers: dict[type, Any] = {
        PythonVerifier.Config: PythonVerifier.Config(function=f"{tmp_path / 'evil.py'}:score"),
        ModelConfig: ModelConfig(path="somebody/model", trust_remote_code=True),
        GymnasiumText.Config: GymnasiumText.Config(id="evil:Env-v1", actions=["go"]),
    }
    schema, places = _roots()[root], 0
    for path, section in known.walk(schema):
        if section not in dangers:
            continue
        places += 1
        assert len(trusted(_holding(schema, path, dangers[section], VerifierConfig), tmp_path)) == 1, path
    assert places


def _holding(schema: type[BaseModel], path: tuple, value: Any, base: type[BaseModel]) -> BaseModel:
    """A section in which nothing stands but this value, in the place that the path names."""
    from posttrain.config import known

    name, *rest = path
    needed = {"training": TrainingConfig(max_steps=1)} if schema is Recipe else {}
    if not rest:
        return schema.model_construct(**{name: [value]}, **needed)
    inner = [
        each for at, each in known.walk(schema.model_fields[name].annotation) if not at and not issubclass(each, base)
    ]
    holder = next(each for each in inner if any(at == tuple(rest) and type(value) is s for at, s in known.walk(each)))
    return schema.model_construct(**{name: [_holding(holder, tuple(rest), value, base)]}, **needed)


@pytest.fixture
def pipeline(recipe, tmp_path: Path):
    """A pipeline with a plugin in one stage and a reward function in another; a study with the recipe as its arm."""
    path = recipe(plugins=["evil.py"])
    data = yaml.safe_load(path.read_text())
    sampled = {key: data[key] for key in ("model", "data", "rollouts")}
    sampled["verifier"] = [{"type": "python", "function": "evil.py:score"}]
    stages = [{"name": "own", "sample": sampled}, {"name": "train", "train": "recipe.yaml"}]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"pipeline": "p", "output": "out", "stages": stages}))
    problems = {"task": "chain_sum", "levels": [2], "size": 2, "split": "test"}
    benchmark = {"name": "b", "data": problems, "verifier": [{"type": "procedural"}]}
    study = {"study": "s", "output": "out", "arms": {"a": "recipe.yaml"}, "seeds": 2}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"evaluate": {"benchmarks": [benchmark]}}))
    return path


def test_a_pipeline_that_is_looked_at_runs_nothing(pipeline, tmp_path: Path) -> None:
    said = check(tmp_path / "pipeline.yaml")
    assert "own: verifier.python" in said and "train: plugins" in said and "no code of it runs here" in said
    assert not (tmp_path / "mark").exists()
    check(tmp_path / "pipeline.yaml", "--run-code")
    assert (tmp_path / "mark").exists()


def test_a_study_that_is_looked_at_runs_nothing(pipeline, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["study", "study.yaml", "--check"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "a: train: plugins" in result.output and "no code of it runs here" in result.output
    assert not (tmp_path / "mark").exists()
    result = CliRunner().invoke(app, ["study", "study.yaml", "--check", "--run-code"])
    assert result.exit_code == 0 and (tmp_path / "mark").exists(), (result.output, result.exception)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ({"type": "python", "function": "evil.py:score"}, "runs .*evil.py:score"),
        ({"type": "code", "isolation": "rlimit"}, "no sandbox"),
        (
            {"type": "judge", "endpoint": "http://judge.example/v1", "model": "m", "principles": ["Right."]},
            "sends prob",
        ),
        ({"type": "nobody's"}, "no verifier"),
    ],
)
def test_a_verifier_of_the_data_is_not_run(verifier, message: str, recipe, tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.contract.recipes import write_traces
    from posttrain.errors import PosttrainError
    from posttrain.study.traces import write_study

    traces = write_traces(tmp_path / "traces.jsonl")
    manifest = tmp_path / "traces.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"verifier": [verifier]}))
    with pytest.raises(PosttrainError, match=message):
        write_study([traces], str(tiny_model), tmp_path / "out", flops=1e8, seeds=2, rates=[1e-3])
    assert not (tmp_path / "out").exists() and not (tmp_path / "mark").exists()


def test_a_study_of_traces_that_was_there_already_is_not_run(recipe, tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.contract.recipes import write_traces
    from posttrain.errors import RecipeError
    from posttrain.study.traces import write_study

    traces = write_traces(tmp_path / "traces.jsonl")
    manifest = tmp_path / "traces.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"verifier": [{"type": "procedural"}]}))
    made: dict[str, Any] = {"flops": 1e8, "seeds": 2, "rates": [1e-3]}
    write_study([traces], str(tiny_model), tmp_path / "out", **made)
    planted = tmp_path / "out" / "traces.yaml"
    data = yaml.safe_load(planted.read_text())
    data["evaluate"]["benchmarks"][0]["verifier"] = [{"type": "python", "function": "evil.py:score"}]
    planted.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match="runs .*evil.py:score"):
        write_study([traces], str(tiny_model), tmp_path / "out", **made)
    assert write_study([traces], str(tiny_model), tmp_path / "out", **made, run_code=True)
    assert not (tmp_path / "mark").exists()
