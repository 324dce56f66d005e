"""`sample`, `prepare` and `inspect` as a user calls them, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.sample import sample_config
from posttrain.config.schema import FileSource
from posttrain.data.sources import preferences
from posttrain.data.traces import read_traces
from posttrain.errors import DataError, PosttrainError, RecipeError

SETTINGS = {
    "data": {"prompts": {"path": "problems.jsonl", "reference": "answer"}},
    "verifier": [{"type": "exact", "pattern": "^(.)"}],
    "verifier_pool": {"workers": 0},
    "rollouts": {"samples_per_prompt": 24, "max_new_tokens": 4},
    "threads": 1,
}


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "answer": str(i)} for i in range(4)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    Path("whole.yaml").write_text(yaml.safe_dump(SETTINGS | {"model": {"path": str(tiny_model)}, "output": "a.jsonl"}))
    return tmp_path


def call(*words: str) -> str:
    """What the command prints; errors are raised, as `main` sees them."""
    return CliRunner().invoke(app, list(words), catch_exceptions=False).output


def test_options_of_sample_are_keys_of_its_settings(folder):
    given = {"rollouts.engine": "vllm", "workers": 3, "address": None}
    settings = sample_config("whole.yaml", None, ["seed=4"], None, given)
    assert (settings.rollouts.engine, settings.workers, settings.address, settings.seed) == ("vllm", 3, None, 4)
    with pytest.raises(RecipeError, match="workers"):
        call("sample", "whole.yaml", "--workers", "0")
    with pytest.raises(RecipeError, match="engine"):
        call("sample", "whole.yaml", "--engine", "vlm")
    with pytest.raises(RecipeError, match="`address` has no effect with one worker"):
        call("sample", "whole.yaml", "--address", "auto")


def test_sample_inspect_pairs_and_back(folder, tiny_model):
    out = call("sample", str(tiny_model), "--config", "settings.yaml", "--output", "t.jsonl", "--parquet")
    assert "4 of 4 prompts done" in out and "t.jsonl: 96 traces of 4 prompts (0 of them found)" in out
    assert read_traces(["t.jsonl"]).traces == read_traces(["t.parquet"]).traces
    assert "96 traces of 4 prompts (96 of them found)" in call(
        "sample", str(tiny_model), "--config", "settings.yaml", "--output", "t.jsonl"
    )

    out = call("inspect", "t.jsonl", "--output", "figures.json", "--k", "1,8")
    assert "pass@8" in out and "informative groups" in out and "advice" in out
    figures = json.loads(Path("figures.json").read_text())
    assert len(figures["figures"]) == 4 and {each["family"] for each in figures["advice"]} >= {"online RL"}
    assert json.loads(call("inspect", "t.jsonl", "--json", "--k", "1,8")) == figures

    out = call(
        "prepare",
        "pairs",
        "t.jsonl",
        "--out",
        "pairs.jsonl",
        "--strategy",
        "margin",
        "--max-pairs",
        "2",
        "--unfinished",
        "--own",
        "t.jsonl",
    )
    rows = preferences(FileSource(path="pairs.jsonl"), "preferences")
    report = json.loads(Path("pairs.report.json").read_text())
    assert f"pairs.jsonl: {len(rows)} pairs" in out and report["pairs"] == len(rows) > 0
    assert report["own"] == [1.0, 1.0] and report["traces"] == 96
    assert all(row.scores == {"chosen": 1.0, "rejected": 0.0} for row in rows)
    known = {(trace.prompt, trace.text): trace.correct for trace in read_traces(["t.jsonl"]).traces}
    assert all(known[row.problem.prompt, row.chosen] for row in rows)
    assert not any(known[row.problem.prompt, row.rejected] for row in rows)


def test_settings_of_one_file(folder, tiny_model):
    config = sample_config("whole.yaml", None, ["seed=3", "rollouts.temperature=0.5"], None)
    assert (config.model.path, config.output, config.seed) == (str(tiny_model), "a.jsonl", 3)
    assert config.rollouts.temperature == 0.5 and config.round_size == 24
    assert sample_config("whole.yaml", None, ["stop_at_correct=1"], Path("b.jsonl")).round_size == 8
    assert sample_config("other/model", Path("whole.yaml"), [], None).model.path == "other/model"


MISTAKES = [
    (("sample", "a/model"), RecipeError, "no settings for 'a/model'"),
    (("sample", "whole.yaml", "--config", "whole.yaml"), RecipeError, "two files of settings"),
    (("sample", "a/model", "--config", "settings.yaml"), RecipeError, "missing key 'output'"),
    (("sample", "whole.yaml", "rollouts.samples=3"), RecipeError, "override 'rollouts.samples=3': .*unknown key"),
    (("inspect", "gone.jsonl"), DataError, "no such file"),
    (("inspect", "gone.jsonl", "--k", "1"), DataError, "no such trace file"),
    (("inspect", "gone.jsonl", "--k", "1,x"), RecipeError, "--k: whole numbers from 1"),
    (("prepare", "pairs", "gone.jsonl", "--out", "p.jsonl"), DataError, "no such trace file"),
    (("prepare", "pairs", "x", "--out", "p.csv"), RecipeError, "pairs are written as .jsonl"),
    (
        ("prepare", "pairs", "x", "--out", "p.jsonl", "--strategy", "bestworst"),
        RecipeError,
        "did you mean 'best_worst'",
    ),
    (("prepare", "traces", "settings.yaml"), RecipeError, "unknown key"),
]


@pytest.mark.parametrize(("words", "error", "message"), MISTAKES)
def test_mistakes(folder, words, error, message):
    with pytest.raises(PosttrainError, match=message) as caught:
        call(*words)
    assert isinstance(caught.value, error)


def test_texts_of_others(folder):
    settings = {
        "data": {"completions": {"task": "chain_sum", "levels": [2], "size": 8}},
        "policy": "annotator",
        "verifier": [{"type": "procedural"}],
        "verifier_pool": {"workers": 0},
        "output": "expert.jsonl",
    }
    Path("expert.yaml").write_text(yaml.safe_dump(settings))
    out = call("prepare", "traces", "expert.yaml", "provenance=by rule")
    assert "8 correct" in out and read_traces(["expert.jsonl"]).traces[0].policy == "annotator"
    with pytest.raises(DataError, match="no pair can be made of 8 traces: .* with too few different texts"):
        call("prepare", "pairs", "expert.jsonl", "--out", "p.jsonl")
    assert not Path("p.jsonl").exists()
    assert "annotator" in call("inspect", "expert.jsonl")


def test_steps_of_texts_of_others(folder):
    rows = [{"prompt": "1+2=", "completion": "1+2=3;#3", "step_ends": ends} for ends in ([6, 8], [9])]
    source = {"path": "texts.jsonl", "prompt": "prompt", "completion": "completion"}
    settings = {"data": {"completions": source}, "policy": "people", "output": "steps.jsonl"}
    Path("steps.yaml").write_text(yaml.safe_dump(settings))
    Path("texts.jsonl").write_text(json.dumps(rows[0]) + "\n")
    call("prepare", "traces", "steps.yaml")
    assert read_traces(["steps.jsonl"]).traces[0].step_ends == [6, 8]
    Path("texts.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match="`step_ends` is .9., for a text of 8 characters"):
        call("prepare", "traces", "steps.yaml", "output=other.jsonl")
