"""`posttrain check RECIPE --batch`: the first batch as it would be trained on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.trainers.preview import first_batch


def check(recipe, *words):
    return CliRunner().invoke(app, ["check", str(recipe), *words, "--batch"], catch_exceptions=False).output


def test_a_mixed_batch_says_source_mask_and_advantage_of_each_row(load):
    rows = first_batch(load({"name": "chord", "expert_rows_per_step": 6}, {"batch.micro_batch": 8}))
    assert [row.source for row in rows] == ["policy"] * 16 + ["expert"] * 6
    for row in rows:
        texts = {label: text for text, label in row.pieces}
        assert [label for _, label in row.pieces] == ["prompt", "trained"]
        assert 0 < row.trained < row.tokens and texts["prompt"].endswith("=")
        assert (row.advantage is None) == (row.reward is None) == (row.verdict == "") == (row.source == "expert")
    rollouts = [row for row in rows if row.source == "policy"]
    assert abs(sum(row.advantage for row in rollouts)) < 1e-4 and any(row.advantage for row in rollouts)
    assert {row.micro_batch for row in rows} == {0, 1, 2}


def test_prefixes_are_told_from_prompts(load):
    rows = first_batch(load({"name": "prefixrl", "prefixed_share": 0.5}))
    for row in rows:
        labels = [label for _, label in row.pieces]
        assert labels == (["prompt", "prefix", "trained"] if row.prefix else ["prompt", "trained"])
        assert (row.source == "prefix") == (row.prefix > 0)
        if row.prefix:
            assert len(row.pieces[1][0]) == row.prefix  # one token per character in this model
    assert {row.source for row in rows} == {"policy", "prefix"}


@pytest.mark.parametrize(
    ("method", "source", "role"),
    [({"name": "sft"}, "expert", ""), ({"name": "dpo"}, "data", "chosen"), ({"name": "rec"}, "policy", "")],
)
def test_every_shell_shows_its_batch(method, source, role, load):
    rows = first_batch(load(method))
    assert {row.source for row in rows} == {source} and role in {row.role for row in rows}
    assert all(row.trained > 0 for row in rows)


def test_the_command_prints_all_rows_and_one_of_each_source(write_recipe, tmp_path):
    recipe = write_recipe({"name": "chord", "expert_rows_per_step": 4})
    before = sorted(tmp_path.rglob("*"))
    out = check(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    assert "traces: 64 rows: 64 kept" in out and "for 64 of 64 prompts" in out
    assert "expert rows per step  4" in out and "accumulation steps    2" in out
    lines = out[out.index("first batch") :].splitlines()
    assert sum(line.lstrip().startswith("0  ") and " policy " in line for line in lines) == 16
    assert sum(line.lstrip().startswith("1  ") and " expert " in line for line in lines) == 4
    assert any(line.startswith("expert:") and "tokens are trained on" in line for line in lines)
    assert sum("[prompt]" in line for line in lines) == sum("[trained]" in line for line in lines) == 2


def test_nothing_is_loaded_without_the_flag(write_recipe):
    recipe = write_recipe({"name": "chord", "expert_rows_per_step": 4}, {"model.path": "nowhere/at-all"})
    out = CliRunner().invoke(app, ["check", str(recipe)], catch_exceptions=False).output
    assert "not checked" in out and "first batch" not in out


def test_traces_for_other_problems_are_told(write_recipe, tmp_path):
    traces = Path(tmp_path / "traces.jsonl")
    traces.write_text(json.dumps({"prompt": "9+9=", "completion": "18#8"}) + "\n")
    source = {"path": str(traces), "completion": "completion"}
    recipe = write_recipe({"name": "chord", "expert_rows_per_step": 1}, {"data.traces": source})
    assert "traces: 1 rows: 1 kept" in (out := check(recipe)) and "for 0 of 64 prompts" in out


@pytest.mark.parametrize("method", [{"name": "chord", "expert_rows_per_step": 1}, {"name": "prefixrl"}])
def test_a_trace_of_each_source_is_shown(write_recipe, tmp_path, method):
    for name in ("one", "two"):
        rows = [{"prompt": f"{n}+9=", "completion": f"{n + 9}#{name}"} for n in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "completion": "completion"} for name in ("one", "two")]
    recipe = write_recipe(method, {"data.traces": sources})
    out = CliRunner().invoke(app, ["check", str(recipe)], catch_exceptions=False).output
    assert "  one: 2 rows: 2 kept" in out and "  two: 2 rows: 2 kept" in out
    for name in ("one", "two"):
        if method["name"] == "chord":
            assert f"expert {name}, {name}/0, trained tokens in [[ ]]" in out and "[[9" in out
        else:
            assert f"trace {name}, {name}/0, of which the method takes beginnings" in out
