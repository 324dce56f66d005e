from __future__ import annotations

import pytest

from posttrain.errors import RecipeError


def test_values_are_yaml_and_the_last_one_wins(load, online: str) -> None:
    recipe, locations = load(
        online,
        "training.learning_rate=1e-5",
        "training.max_steps=7",
        "training.max_steps=9",
        "data.prompts={task: countdown, levels: {3: 0.5}, size: 4}",
        "data.prompts.levels.3=0.25",
        "evaluation={benchmarks: [{name: a, data: {path: x.jsonl, reference: y}, verifier: [{type: math}]}]}",
        "evaluation.benchmarks.0.name=b",
        "training.run_name='x: y'",
        "method.window=[0.2, 0.3]",
        "tracking.plots=false",
    )
    assert recipe.training.learning_rate == 1e-5 and recipe.training.max_steps == 9
    assert recipe.data.prompts.task == "countdown" and recipe.data.prompts.levels == {3: 0.25}
    assert recipe.evaluation.benchmarks[0].name == "b"
    assert recipe.training.run_name == "x: y" and recipe.method.window == (0.2, 0.3) and not recipe.tracking.plots
    assert locations.place(("data", "prompts", "size")).startswith("override 'data.prompts={task")
    assert locations.place(("data", "prompts", "levels", 3)) == "override 'data.prompts.levels.3=0.25'"
    assert locations.place(("batch", "micro_batch")) == "recipe.yaml:14"


def test_null_unsets_and_a_section_may_be_opened_again(load, online: str) -> None:
    recipe, _ = load(online, "rollouts=null")
    assert recipe.rollouts is None
    recipe, _ = load(online, "rollouts=null", "rollouts.temperature=0.5")
    assert recipe.rollouts.temperature == 0.5 and recipe.rollouts.samples_per_prompt == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.max_stps=5",
            "override 'training.max_stps=5': training.max_stps: unknown key\n  did you mean 'max_st",
        ),
        ("trainin.max_steps=5", "override 'trainin.max_steps=5': trainin: unknown key\n  did you mean 'training'?"),
        ("batch.samples_per_prompt=2", "unknown key\n  'samples_per_prompt' belongs under `rollouts`"),
        ("training.max_steps=x", "override 'training.max_steps=x': training.max_steps: expected a whole number"),
        ("output.x=1", "override 'output.x=1': output is 'runs/test' and has no keys, so 'x' cannot be set in it"),
        ("training.max_steps.x=1", "training.max_steps is 5 and has no keys"),
        ("verifier.1.weight=2", "verifier is a list and has no entry '1'\n  positions 0 to 0"),
        ("verifier.first.weight=2", "verifier is a list and has no entry 'first'"),
        ("verifier.0.weight=x", "override 'verifier.0.weight=x': verifier.0.weight: expected a number, got text 'x'"),
        ("training", "override 'training': an override is `section.key=value`"),
        ("=3", "override '=3': an override is `section.key=value`"),
        ("training..x=3", "an override is `section.key=value`"),
        ("training.run_name=", "no value\n  write training.run_name=null to unset it"),
        (
            "training.run_name=a: b: c",
            "not valid YAML: mapping values are not allowed here\n  the value is read as YAML",
        ),
        ("training.run_name=a: b", "training.run_name: expected text, got a mapping\n  put text that contains ': '"),
        ("training.run_name=[a", "override 'training.run_name=[a': not valid YAML"),
    ],
)
def test_bad_overrides(load, online: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(online, override)
    assert message in str(caught.value)
    assert f"override {override!r}" in str(caught.value)


def test_all_bad_overrides_come_at_once(load, online: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(online, "x", "output.y=1", "seed=2")
    assert str(caught.value).count("override") == 3  # one of them in the explanation of the form
