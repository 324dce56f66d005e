"""The ready-made study of traces: what it writes, what it leaves out, and what it says of results."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.contract.recipes import write_traces
from posttrain.data.traces import read_traces
from posttrain.errors import PosttrainError
from posttrain.study.schema import load_study
from posttrain.study.traces import answer, write_study


@pytest.fixture
def traces(tmp_path, monkeypatch):
    """A trace file in the working directory, judged by a verifier."""
    monkeypatch.chdir(tmp_path)
    path = write_traces(Path("traces.jsonl"))
    manifest = Path("traces.manifest.json")
    verifier = [{"type": "procedural", "profile": "strict"}]
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"verifier": verifier}))
    return path


def test_every_arm_that_can_use_the_traces_is_checked_and_nobody_sees_held_out_problems(traces, tiny_model):
    arguments = [
        "study",
        "traces",
        str(traces),
        "--model",
        str(tiny_model),
        "--flops",
        "1e8",
        "--seeds",
        "4",
        "--check",
    ]
    arguments += ["--rates", "1e-3,1e-2", "--output", "out"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "advice" in result.output and "tuning: " in result.output
    study = load_study(Path("out/traces.yaml"))
    assert {"sft", "rejection", "sft_then_grpo", "grpo", "chord", "prefixrl", "rec_replay", "oreo"} <= set(
        study.config.arms
    )
    assert study.config.grid == {"training.learning_rate": [1e-3, 1e-2]} and study.config.budget.traces == "sunk"
    seen, held_out = (
        {json.loads(line)["prompt"] for line in Path(f"out/inputs/{name}.jsonl").read_text().splitlines()}
        for name in ("train", "held_out")
    )
    assert held_out and not seen & held_out
    assert {trace.prompt for trace in read_traces(["out/inputs/traces-0.jsonl"]).traces} == seen


@pytest.mark.parametrize(
    ("change", "message"),
    [({"verifier": []}, "name no verifier"), (None, "no trace is right")],
)
def test_traces_that_say_nothing_are_refused(traces, tiny_model, change, message):
    if change is None:
        traces.write_text(traces.read_text().replace('"verdict":"correct"', '"verdict":"wrong"'))
    else:
        manifest = Path("traces.manifest.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(PosttrainError, match=message):
        write_study([traces], str(tiny_model), Path("out"), flops=1e8, seeds=2, rates=[1e-3])


def test_the_answer_in_words():
    def arm(name, found, start=0.1):
        cells = [{"seed": s, "score": v, "error": "", "curve": [{"score": start}]} for s, v in enumerate(found)]
        return {"name": name, "cells": cells}

    decision = {"first": "a", "second": "b", "outcome": "first", "look": 1, "difference": 0.5}
    open_ = {"first": "a", "second": "c", "outcome": "undecided", "look": None, "difference": 0.1}
    advice = {"first": "a", "second": "c", "next_look": [0, 0], "in_all": 8, "within_plan": False}
    comparison = {"plan": {"alpha": 0.05}, "result": {"decisions": [decision, open_]}, "advice": [advice]}
    arms = [arm("a", [0.8, 0.9]), arm("b", [0.3, 0.4]), arm("c", [0.7, 0.8])]
    lines = answer({"arms": arms, "config": {}, "comparison": comparison, "undecidable": ""})
    assert lines[0].startswith("Best: a, 85.0 [")
    assert lines[1].startswith("The model they all start from: 10.0 [")
    assert lines[2].startswith("c against it: -10.0") and lines[3].startswith("b against it: -50.0")
    assert "1 of 2 others are told apart" in lines[4] and "a and c apart with 80% probability: about 8" in lines[5]
    lines = answer({"arms": arms, "config": {}, "comparison": None, "undecidable": "too few seeds"})
    assert "no test, since too few seeds" in lines[-1]
    assert answer({"arms": [], "config": {}, "comparison": None, "undecidable": ""}) == [
        "No arm was measured, so nothing can be said."
    ]
