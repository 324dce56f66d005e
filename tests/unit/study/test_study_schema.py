"""What a study file may say, where its complaints point, and which cells it stands for."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.study import of_target
from posttrain.errors import PosttrainError
from posttrain.study.cell import price
from posttrain.study.plan import cell_of, check_study, in_words
from posttrain.study.schema import load_study
from posttrain.study.table import markdown

CHAIN = {"task": "chain_sum", "levels": [2], "size": 8}
EVALUATE = {"benchmarks": [{"name": "fresh", "data": CHAIN, "verifier": [{"type": "procedural"}]}], "max_new_tokens": 4}
EPOCHS = {"training.max_steps": None, "training.num_train_epochs": 1}
ROOT = Path(__file__).resolve().parents[3]
NONE = {"seeds": None, "measure": None, "output": None}


@pytest.fixture
def write(write_recipe, tmp_path, monkeypatch):
    """`write(changes)` -> a study file with two arms, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_recipe({"name": "sft"}, {"evaluation": EVALUATE | {"every": 2}})

    def make(changes=None):
        study = {"study": "s", "output": "out", "arms": {"one": "recipe.yaml", "two": "recipe.yaml"}, "seeds": 2}
        study |= {"evaluate": EVALUATE} | (changes or {})
        path = tmp_path / "study.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in study.items() if value is not None}, sort_keys=False)
        )
        return path

    return make


def arm(**keys):
    return {"arms": {"one": {"recipe": "recipe.yaml", **keys}, "two": "recipe.yaml"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"one": {"set": {}}}}, "exactly one of recipe, pipeline, stages"),
        ({"arms": {"a/b": "recipe.yaml"}}, "names a folder"),
        ({"seeds": None}, "give `seeds`"),
        ({"seeds": [1, 1]}, "given twice"),
        ({"grid": {"training.learning_rate": [1e-3, 1e-2]}}, "give `tuning_seeds`"),
        ({"grid": {"training.learning_rate": [1e-3, 1e-2]}, "tuning_seeds": [1]}, "seed 1 is reported and tuned on"),
        ({"tuning_seeds": 2}, "no effect without a `grid`"),
        ({"budget": {"flops": 1e9, "tokens": 1e3}}, "exactly one of flops, tokens, environment_steps, seconds"),
        ({"budget": {"seconds": 9.0, "traces": "charged"}}, "how many seconds"),
        ({"evaluate": EVALUATE | {"measure": "pass@4"}}, "no measure 'pass@4'"),
        ({"evaluate": EVALUATE | {"every": 5}}, "`every` has no effect"),
        ({"evaluate": EVALUATE | {"beside": ["old"]}}, "no benchmark of these: 'old'; fresh"),
        ({"evaluate": EVALUATE | {"beside": ["fresh"]}}, "nothing makes up the score"),
        ({"sequential": {"seeds_per_look": 1}}, "can never tell arms apart"),
        ({"sequential": {}}, "need 15 seeds, got 2"),
        (arm(evaluate={"max_new_tokens": 9}), "`evaluate.max_new_tokens` is the same for all arms"),
        (arm(evaluate={"measure": "beam@3"}), "no measure 'beam@3'"),
        (arm(evaluate={"beams": 2}) | {"evaluate": EVALUATE | {"points": 2}}, "no effect on `points`"),
        ({"baseline": "three"}, "no arm 'three'"),
        ({"sed": 1}, "sed: unknown key"),
        (arm(set={"training.learning_rat": 1.0}), "study.yaml:7: training.learning_rat"),
        (arm(set={"seed": 1}), "study.yaml:7: seed: `seed` is set by the study"),
        ({"arms": {"one": "recipe.yaml", "two": "resipe.yaml"}}, "resipe.yaml"),
        ({"arms": {"one": {"stages": [{"name": "a", "eval": EVALUATE | {"model": "x"}}]}}}, "trains nothing"),
        ({"evaluate": EVALUATE | {"points": 2}} | arm(set=EPOCHS), "`points`"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(write, changes, message):
    with pytest.raises(PosttrainError) as caught:
        check_study(load_study(write(changes)))
    assert message in str(caught.value)


def test_cells_differ_by_what_changes_their_result(write):
    study = load_study(write(arm(set={"training.max_steps": 4})))
    key = {
        (name, seed, each.config.output): cell_of(each, "reported", name, {}, seed).request.key
        for each in (study, load_study(write(arm(set={"training.max_steps": 4})), ["output=elsewhere"]))
        for name in ("one", "two")
        for seed in (0, 1)
    }
    assert key["one", 0, "out"] == key["one", 0, "elsewhere"]
    assert len({key["one", 0, "out"], key["one", 1, "out"], key["two", 0, "out"]}) == 3
    for changes in ({"budget": {"flops": 1e9}}, {"evaluate": EVALUATE | {"measure": "avg@1"}}):
        changed = cell_of(load_study(write(changes)), "reported", "two", {}, 0)
        assert key["two", 0, "out"] != changed.request.key


def test_an_arm_can_be_measured_by_a_search_of_its_own(write):
    value = {"path": "${train.run}/critic", "delimiter": None}
    study = load_study(write(arm(evaluate={"beams": 4, "value": value, "measure": "beam@4"})))
    found = {name: cell_of(study, "reported", name, {}, 0).request for name in ("one", "two")}
    assert found["one"].measure == "beam@4" and found["two"].measure == "greedy"
    searched, plain = (request.stages[-1]["eval"] for request in found.values())
    assert searched == plain | {"beams": 4, "value": value}
    arms = [
        {"name": name, "setting": {}, "tuned": [], "tuning": [], "cells": [cell | {"answer_tokens": tokens}]}
        for name, tokens, cell in (("one", 36.5, CELL), ("two", 9.25, CELL))
    ]
    config = study.config.model_dump(mode="json", exclude_unset=True)
    table = markdown(
        {"study": "s", "config": config, "arms": arms, "comparison": None, "undecidable": "", "changes": []}
    )
    assert "| measure | tokens an answer |" in table
    assert "| beam@4 | 36.5 |" in table and "| greedy | 9.2 |" in table


def test_problems_that_a_shared_stage_found_are_measured_while_training_too(write):
    sampled = {"model": {"path": "m"}, "data": {"prompts": CHAIN}, "verifier": [{"type": "procedural"}]}
    shared = [
        {"name": "bought", "sample": sampled | {"rollouts": {"samples_per_prompt": 2, "max_new_tokens": 4}}},
        {"name": "solved", "completions": {"traces": ["${bought.traces}"]}},
    ]
    found = {"path": "${solved.completions}", "reference": "reference", "chat": False}
    benchmark = {"name": "solved", "data": found, "verifier": [{"type": "procedural"}]}
    trained = arm(set={"data.completions": found | {"completion": "completion"}, "training.max_steps": 4})
    study = load_study(write(trained | {"shared": shared, "evaluate": {"benchmarks": [benchmark], "points": 2}}))
    cell = cell_of(study, "reported", "one", {}, 0)
    (measured,) = cell.request.evaluate["benchmarks"]
    assert measured["data"]["path"] == "out/shared/seed-0/solved/completions.jsonl"


def test_settings_are_all_combinations_and_have_names(write):
    grid = {"training.learning_rate": [1e-3, 1e-2], "batch.micro_batch": [1, 2]}
    study = load_study(
        write(
            {
                "grid": grid,
                "tuning_seeds": 1,
                "arms": {"one": "recipe.yaml", "two": {"recipe": "recipe.yaml", "grid": {"seed": [1]}}},
            }
        )
    )
    assert [in_words(each) for each in study.config.settings("one")][1] == "learning_rate=0.001, micro_batch=2"
    assert len(study.config.settings("one")) == 4 and len(study.config.settings("two")) == 1
    assert study.config.reported == [0, 1] and study.config.tuning == [10_000]


def test_the_short_form_is_a_study_of_a_recipe(write):
    write()
    sweep = ["training.learning_rate=1e-3,1e-2", "batch.micro_batch=1,2"]
    study = of_target(Path("recipe.yaml"), ["training.max_steps=2"], sweep, NONE | {"output": "swept"})
    assert list(study.config.arms) == [
        f"learning_rate={rate}+micro_batch={size}" for rate in (0.001, 0.01) for size in (1, 2)
    ]
    check_study(study)
    cell = cell_of(study, "reported", "learning_rate=0.01+micro_batch=1", {}, 2)
    assert cell.request.stages[0]["set"] == {
        "training.max_steps": 2, "training.learning_rate": 0.01, "batch.micro_batch": 1, "seed": 2,
    }  # fmt: skip
    assert cell.request.measure == "greedy" and study.config.reported == [0, 1, 2]


def test_check_says_what_would_run_and_runs_nothing(write):
    write({"arms": {"one": "recipe.yaml", "two": "recipe.yaml"}, "budget": {"flops": 1e9}})
    result = CliRunner().invoke(app, ["study", "study.yaml", "--check"], catch_exceptions=False)
    assert result.exit_code == 0 and "2 arms (one, two), 2 seeds" in result.output and "traces charged" in result.output
    assert not Path("out").exists()


CELL = {"seed": 0, "error": None, "score": 0.5, "steps": 4, "spent": {"flops": 1e9}, "beside": {}}
STUDIES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.real] * path.stem.startswith("smollm2"))
    for path in sorted((ROOT / "studies").glob("*.yaml"))
]


@pytest.mark.parametrize("path", STUDIES)
def test_the_studies_of_the_repository_pass_their_check(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where they are run from
    check_study(load_study(path))


def test_what_a_run_takes_once_is_no_part_of_the_price_of_a_step():
    # The reference's scores of all rows come before the first step: 100, and each step takes 10.
    logged = [(0, {}), *((step, {"flops": 100.0 + 10 * step}) for step in (1, 2, 3))]
    assert price(logged, "flops", written=True) == (100.0, 10.0)
    assert price([logged[0], logged[2], logged[3]], "flops", written=True) == (100.0, 10.0)
    assert price(logged, "flops", written=False) == (0.0, 130 / 3)  # rollouts of the first step may be for the others
    assert price(logged[:2], "flops", written=True) == (0.0, 110.0)  # of one step nothing else can be told
    assert price(logged, "environment_steps", written=True) == (0.0, 0.0)
