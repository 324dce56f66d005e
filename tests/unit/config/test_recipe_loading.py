from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config.loading import dump_recipe, load_config, load_recipe, parse_config
from posttrain.config.schema import EvaluationConfig
from posttrain.errors import RecipeError, RecipeErrors


def errors_of(load, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    found = caught.value.errors if isinstance(caught.value, RecipeErrors) else [caught.value]
    return [str(error) for error in found]


def test_a_recipe_loads_with_types_and_defaults(load, online: str) -> None:
    recipe, _ = load(online)
    assert recipe.training.learning_rate == 1e-6
    assert recipe.method.name == "reward" and recipe.method.window == (0.1, 0.9)
    assert recipe.data.prompts.levels == [1, 2] and recipe.rollouts.temperature == 1.0
    assert recipe.training.model_fields_set == {"learning_rate", "max_steps"}


def test_a_list_stands_for_a_tuple_and_a_whole_number_for_a_number(load, online: str) -> None:
    recipe, _ = load(online, "method.window=[0, 1]", "data.prompts.levels={1: 1, 3: 0.5}")
    assert recipe.method.window == (0.0, 1.0) and recipe.data.prompts.levels == {1: 1.0, 3: 0.5}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # unknown keys
        (
            "max_steps: 5",
            "max_stepz: 5",
            "recipe.yaml:17: training.max_stepz: unknown key\n  did you mean 'max_steps'?",
        ),
        (
            "  micro_batch: 4",
            "  micro_batch: 4\n  samples_per_prompt: 4",
            "recipe.yaml:15: batch.samples_per_prompt: unknown key\n  'samples_per_prompt' belongs under `rollouts`",
        ),
        (
            "output:",
            "learning_rate: 1\noutput:",
            "recipe.yaml:18: learning_rate: unknown key\n  'learning_rate' belongs",
        ),
        ("name: reward", "name: reward\n  bta: 1", "recipe.yaml:9: method.bta: unknown key\n  did you mean 'beta'?"),
        (
            "task: chain_sum",
            "task: chain_sum\n    path: x",
            "data.prompts.path: unknown key\n  `path` and `task` exclude",
        ),
        (
            "type: procedural",
            "type: procedural\n    ignore_case: true",
            "verifier.0.ignore_case: unknown key\n  'ignore_case' goes with `type: exact`, and this section has",
        ),
        ("  micro_batch: 4", "  micro_batch: 4\n  beta: 1", "batch.beta: unknown key\n  'beta' belongs under `method`"),
        # wrong types
        (
            "max_steps: 5",
            "max_steps: '5'",
            "recipe.yaml:17: training.max_steps: expected a whole number (at least 1), got",
        ),
        ("max_steps: 5", "max_steps: '5'", "got text '5'\n  write 5 without quotes"),
        (
            "max_steps: 5",
            "max_steps: 5.0",
            "training.max_steps: expected a whole number (at least 1), got 5.0\n  write 5",
        ),
        ("max_steps: 5", "max_steps: true", "expected a whole number (at least 1), got true"),
        ("max_steps: 5", "max_steps: [5]", "expected a whole number (at least 1), got a list"),
        (
            "max_steps: 5",
            "max_steps: 5\n  bf16: yes",
            "training.bf16: expected true or false, got text 'yes'\n  write true",
        ),
        ("max_steps: 5", "max_steps: 5\n  bf16: 1", "training.bf16: expected true or false, got 1"),
        ("max_steps: 5", "max_steps: 5\n  run_name: 7", "training.run_name: expected text, got 7\n  put it in quotes"),
        (
            "max_steps: 5",
            "max_steps: 5\n  report_to: wandb",
            "expected a list of texts, got text 'wandb'\n  write [wandb]",
        ),
        ("1e-6", "fast", "training.learning_rate: expected a number (greater than 0), got text 'fast'"),
        ("levels: [1, 2]", "levels: [1, x]", "data.prompts.levels.1: expected a whole number, got text 'x'"),
        ("levels: [1, 2]", "levels: 1", "data.prompts.levels: expected a list of whole numbers or a mapping, got 1"),
        ("levels: [1, 2]", "levels: {a: 1}", "data.prompts.levels.a: the key must be a whole number, got text 'a'"),
        ("  - type: procedural", "  type: math", "verifier: expected a list of mappings, got a mapping"),
        ("  - type: procedural", "  - math", "verifier.0: expected a mapping, got text 'math'"),
        ("name: reward", "name: reward\n  window: [1]", "recipe.yaml:9: method.window: expected a list of 2 numbers"),
        ("name: reward", "name: reward\n  window: 1", "method.window: expected a list of 2 numbers, got 1"),
        # ranges and choices
        ("1e-6", "0", "recipe.yaml:16: training.learning_rate: must be greater than 0, got 0"),
        ("1e-6", ".inf", "training.learning_rate: must be a finite number"),
        ("name: reward", "name: reward\n  beta: -1", "method.beta: must be at least 0, got -1"),
        ("  - type: procedural", "  []", "verifier: needs at least 1 entry"),
        (
            "task: chain_sum",
            "task: chainsum",
            "data.prompts.task: unknown task 'chainsum'",
        ),
        ("task: chain_sum", "task: chainsum", "unknown task 'chainsum'\n  did you mean 'chain_sum'?"),
        (
            "type: procedural",
            "type: procedurl",
            "verifier.0.type: unknown type 'procedurl'\n  did you mean 'procedural'?",
        ),
        ("type: procedural", "weight: 1.0", "verifier.0: missing key 'type'\n  one of math, exact, numeric"),
        # missing keys and rules between keys
        ("output: runs/test", "", "recipe.yaml: missing key 'output'"),
        ("    size: 64\n", "", "recipe.yaml:3: data.prompts: missing key 'size'"),
        (
            "task: chain_sum",
            "tsk: chain_sum",
            "data.prompts: missing key 'path'\n  a section here has one of `path`, `task`",
        ),
        (
            "hidden_size: 32",
            "hidden_size: 33, heads: 2",
            "recipe.yaml:1: model.init: hidden_size 33 is not a multiple of",
        ),
        ("  max_steps: 5\n", "", "recipe.yaml:15: training: give exactly one of `max_steps` and `num_train_epochs`"),
        # the method section
        (
            "name: reward",
            "name: rewards",
            "recipe.yaml:8: method.name: unknown method 'rewards'\n  did you mean 'reward'?",
        ),
        ("name: reward", "beta: 1", "recipe.yaml:7: method: missing key 'name'\n  one of clone, reward"),
        ("method:\n  name: reward", "method: reward", "recipe.yaml:7: method: expected a mapping, got text 'reward'"),
        ("method:\n  name: reward\n", "", "recipe.yaml: missing key 'method'"),
        ("name: reward", "name: reward\n  cap: 2.0", "recipe.yaml:7: method: cap has no effect with clip hard"),
    ],
)
def test_messages(load, online: str, old: str, new: str, message: str) -> None:
    assert old in online
    assert message in "\n".join(errors_of(load, online.replace(old, new)))


def test_all_errors_come_at_once(load, online: str) -> None:
    text = online.replace("max_steps: 5", "max_stepz: x").replace("name: reward", "name: reward\n  beta: none")
    text = text.replace("micro_batch: 4", "micro_batch: 0") + "sed: 1\n"
    errors = errors_of(load, text)
    assert [error.split(": ")[1] for error in errors] == [
        "batch.micro_batch",
        "training.max_stepz",
        "sed",
        "method.beta",
    ]


@pytest.mark.parametrize(
    ("benchmarks", "messages"),
    [
        ("[a, {name: x, verifier: [{type: math}]}]", ["evaluation.benchmarks.1: missing key 'data'"]),
        ("[3]", ["evaluation.benchmarks.0: expected text or a mapping, got 3"]),
        ("[]", ["evaluation: there is nothing to measure: give `benchmarks`"]),
        (
            "[{name: x, data: {task: countdown, levels: [3]}, verifier: [{type: math, x: 1}]}]",
            ["evaluation.benchmarks.0.data: missing key 'size'", "evaluation.benchmarks.0.verifier.0.x: unknown key"],
        ),
    ],
)
def test_errors_inside_unions_show_the_yaml_path_only(load, online: str, benchmarks: str, messages: list[str]) -> None:
    errors = errors_of(load, online + f"evaluation: {{benchmarks: {benchmarks}}}\n")
    assert len(errors) == len(messages)
    for error, message in zip(errors, messages, strict=True):
        assert message in error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text", "data.completions: expected a mapping or a list of mappings, got text 'text'"),
        ("3", "data.completions: expected a mapping or a list of mappings, got 3"),
        ("[1]", "data.completions.0: expected a mapping, got 1"),
        ("[]", "data.completions: needs at least 1 entry"),
        ("[{path: a.jsonl}, {path: b.jsonl, wieght: 2}]", "data.completions.1.wieght: unknown key"),
    ],
)
def test_a_source_that_is_no_mapping(load, supervised: str, source: str, message: str) -> None:
    errors = errors_of(load, supervised, f"data.completions={source}")
    assert len(errors) == 1 and message in errors[0] and "write [text]" not in errors[0]


def test_dump_has_all_defaults_and_loads_to_an_equal_recipe(load, online: str, supervised: str) -> None:
    for text in (online, supervised, online + "evaluation: {benchmarks: [a], k: [1]}\n"):
        recipe, _ = load(text)
        dumped = dump_recipe(recipe)
        again, _ = load(dumped)
        assert again == recipe
        assert dump_recipe(again) == dumped
        assert "adam_epsilon: 1e-08" in dumped


def test_dump_leaves_out_what_would_be_refused_if_written(load, online: str, supervised: str) -> None:
    dumped = dump_recipe(load(online)[0])
    assert "cap" not in dumped  # the method refuses it with clip hard
    assert "vocab_size" not in dumped and "annotator" not in dumped
    soft = dump_recipe(load(online, "method.clip=soft")[0])
    assert "cap: 5.0" in soft
    assert "verifier_pool" not in dump_recipe(load(supervised)[0])


def test_dump_does_not_name_a_prompt_column_beside_a_template(load, supervised: str) -> None:
    text = supervised.replace("prompt: question", "template: 'Q: {question}'")
    dumped = dump_recipe(load(text)[0])
    assert "prompt: prompt" not in dumped
    assert "split" not in dumped  # of a local file


def test_load_recipe_gives_the_recipe_alone(load, online: str) -> None:
    recipe, _ = load(online)
    methods = {"reward": type(recipe.method)}
    assert load_recipe("recipe.yaml", ["seed=3"], methods) == recipe.model_copy(update={"seed": 3})


def test_other_files_have_errors_of_the_same_kind(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.yaml"
    path.write_text("benchmarks: [gsm8k]\nsample: 4\n")
    with pytest.raises(RecipeError) as caught:
        load_config(path, EvaluationConfig)
    assert str(caught.value) == f"{path}:2: sample: unknown key\n  did you mean 'samples'?"
    path.write_text("benchmarks: [gsm8k]\n")
    assert load_config(path, EvaluationConfig, ["samples=4"]).samples == 4


def test_values_from_a_command_line_alone() -> None:
    assert parse_config({}, EvaluationConfig, ["benchmarks=[a]", "k=[1, 2]"]).k == [1, 2]
    with pytest.raises(RecipeError) as caught:
        parse_config({}, EvaluationConfig, ["benchmarks=[a]", "samples=0"])
    assert str(caught.value) == "override 'samples=0': samples: must be at least 1, got 0"
