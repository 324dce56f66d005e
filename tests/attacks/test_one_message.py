"""Damaged files of somebody else end by one message, where a library has a traceback or none at all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app, main
from posttrain.config.own_code import find
from posttrain.config.schema import ModelConfig
from posttrain.errors import DataError, ModelError, PosttrainError, RecipeError, StateError
from posttrain.models.tokenizer import load_tokenizer


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of a model folder, to spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_plugin_that_is_not_there_is_one_message_of_check(tmp_path: Path, tiny_model: Path) -> None:
    recipe = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": {"task": "chain_sum", "levels": [2], "size": 8}},
        "verifier": [{"type": "procedural"}],
        "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 4},
        "method": {"name": "grpo"},
        "batch": {"prompts_per_step": 4, "micro_batch": 4},
        "training": {"max_steps": 1},
        "output": str(tmp_path / "run"),
        "plugins": ["nope.py"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert isinstance(result.exception, RecipeError) and "plugins: there is no file 'nope.py'" in str(result.exception)


@pytest.mark.parametrize("recipe", ["model: 1", "method: [1]", "training: x"])
def test_a_run_whose_recipe_is_none_is_refused(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0}\n')
    (tmp_path / "resolved.yaml").write_text(recipe)
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(tmp_path / "r.html")])
    assert isinstance(result.exception, DataError) and "no section" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [("metrics.jsonl", {"step": 1, "loss": 1.0}, "no `time`"), ("samples.jsonl", None, "nested more than 100 deep")],
)
def test_a_run_with_a_line_that_no_run_writes_is_refused(name: str, line: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0}\n')
    deep = '{"step": 1, "prompt": ' + "[" * 900 + "]" * 900 + "}"
    (tmp_path / name).write_text((deep if line is None else json.dumps(line)) + "\n")
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(tmp_path / "r.html")])
    assert isinstance(result.exception, DataError) and said in str(result.exception)


def test_a_report_with_a_number_of_400_digits_is_refused(tmp_path: Path) -> None:
    report: dict[str, Any] = {"schema": 1, "benchmarks": [], "seconds": 10**400}
    (tmp_path / "report.json").write_text(json.dumps(report))
    for command in (["report", "--output", str(tmp_path / "r.html")], ["compare", str(tmp_path / "report.json")]):
        result = CliRunner().invoke(app, [*command, str(tmp_path / "report.json")])
        assert isinstance(result.exception, DataError) and "more than 64 bits" in str(result.exception)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "1"}, {"spent": {"flops": "x"}}, {"scores": {"b": "x"}}, {"scores": {}}, {"scores": {"b": 1e999}},
        {"curve": [[]]}, {"curve": [{"step": 1}]}, {"run": None},
    ],
)  # fmt: skip
def test_a_damaged_result_of_a_cell_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    from posttrain.study.plan import Cell, CellRequest
    from posttrain.study.running import done

    cell = Cell("reported", "a", {}, 0, CellRequest("key", "s.yaml", str(tmp_path), [], measured="train"))
    point = {"step": 1, "score": 0.5, "flops": 1.0, "tokens": 1, "seconds": 0.0}
    whole = {"key": "key", "run": "r", "report": "p", "steps": 1, "scores": {"b": 0.5}, "spent": {"flops": 1}}
    whole |= {"bought": {}, "beside": {}, "curve": [point]}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert done(cell) == whole
    (tmp_path / "result.json").write_text(json.dumps(whole | change))
    with pytest.raises(DataError, match=f"result.json: not the result of a cell: {next(iter(change))}"):
        done(cell)


def test_a_cell_with_a_damaged_result_is_measured_again(tmp_path: Path) -> None:
    from posttrain.study.plan import Cell, CellRequest
    from posttrain.study.running import CellRunner

    cell = Cell("shared", "shared", {}, 0, CellRequest("key", "s.yaml", str(tmp_path), []))
    (tmp_path / "result.json").write_text("[]")
    said: list[str] = []
    runner = CellRunner(1, None, said.append)
    runner._here = lambda cells: [(each, 1) for each in cells]  # type: ignore[method-assign]  # as if it had failed
    (tmp_path / "log.txt").write_text("error: nothing ran\n")
    (outcome,) = runner.run([cell])
    assert outcome.error.startswith("error: nothing ran") and "it is measured again" in said[0]


def test_an_unknown_activation_is_one_message(model: Path, tmp_path: Path) -> None:
    from posttrain.cli.export import export_command

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "evil"}))
    with pytest.raises(ModelError, match="hidden_act: unknown activation 'evil'"):
        export_command(str(model), tmp_path / "out", None, False, "5GB")


def _with(model: Path, **changes: Any) -> ModelConfig:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | changes))
    return ModelConfig(path=str(model))


def _replace(content: str, pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def test_a_tokenizer_that_makes_a_hundred_characters_of_one_six_times_is_refused(model: Path) -> None:
    bombs = [_replace("1" * 100, {"String": "1"})] * 6
    for key in ("normalizer", "decoder"):
        with pytest.raises(ModelError, match=f"its {key} makes more than"):
            load_tokenizer(_with(model, **{key: {"type": "Sequence", f"{key}s": bombs}}))
        _with(model, **{key: None})
    doubled = [_replace("1", {"Regex": ""})] * 9
    with pytest.raises(ModelError, match="its normalizer makes more than"):
        load_tokenizer(_with(model, normalizer={"type": "Sequence", "normalizers": doubled}))
    usual = [{"type": "Prepend", "prepend": "_"}, _replace("_", {"String": " "})]
    load_tokenizer(_with(model, normalizer={"type": "Sequence", "normalizers": usual}))
    repeated = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000, "pair": []}
    with pytest.raises(ModelError, match="its template repeats"):
        load_tokenizer(_with(model, normalizer=None, post_processor=repeated | {"special_tokens": {}}))


def test_a_pattern_of_a_tokenizer_that_panics_is_one_message(model: Path, monkeypatch, capsys) -> None:
    """The library in Rust raises what is no `Exception`."""
    pattern = {"type": "Split", "pattern": {"Regex": "(?:a|a|a)*$"}, "behavior": "Isolated", "invert": False}
    tokenizer = load_tokenizer(_with(model, pre_tokenizer=pattern))
    text = "a" * 60 + "b"

    def encode() -> None:
        tokenizer(text)

    monkeypatch.setattr("posttrain.cli.main.app", encode)
    monkeypatch.setattr(sys, "argv", ["posttrain"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "error: a library gave up" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["a" * 5000, "~nobody-of-this-name/model"])
def test_a_path_that_cannot_be_is_one_message(path: str, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = {"model": {"path": path}, "data": {"prompts": {"task": "chain_sum", "levels": [2], "size": 8}}}
    recipe |= {"verifier": [{"type": "procedural"}], "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 4}}
    recipe |= {"method": {"name": "grpo"}, "batch": {"prompts_per_step": 4, "micro_batch": 4}, "output": "run"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"training": {"max_steps": 1}}))
    monkeypatch.setattr(sys, "argv", ["posttrain", "check", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "error: no such path" in said and len(said) < 500


@pytest.mark.parametrize("source", ["x = " + "-" * 200_000 + "1", "x = a" + ".b" * 200_000, "x = 1" + " + 1" * 200_000])
def test_code_that_is_nested_too_deeply_is_one_message(source: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"def f(): pass\n{source}\n")
    with pytest.raises(ValueError, match="nested too deeply"):
        find(f"{tmp_path}/own.py:f")


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("false",)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_pickle_in_the_state_of_a_trainer_is_one_message(name: str, tmp_path: Path) -> None:
    """transformers reads it without running it, and torch says so in a long text with ways round it."""
    import torch

    from posttrain.trainers.faults import explained

    torch.save({"state": _Evil()}, tmp_path / name)
    with pytest.raises(StateError, match="holds objects that are not loaded") as caught, explained(tmp_path, None):  # type: ignore[arg-type]  # no estimate is asked for
        torch.load(tmp_path / name, weights_only=True)
    assert len(str(caught.value).splitlines()) < 4


def test_converting_says_that_a_models_code_would_run(tmp_path: Path) -> None:
    theirs = {"model_name_or_path": "m", "trust_remote_code": True, "stage": "sft", "dataset": "d"}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "theirs.yaml")])
    assert not isinstance(result.exception, PosttrainError), result.exception
    assert (
        "trust_remote_code -> model.trust_remote_code: true runs the Python code of the model"
        in result.output + result.stderr
    )
