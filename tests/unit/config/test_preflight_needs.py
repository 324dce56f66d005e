from __future__ import annotations

import pytest

from posttrain.config.loading import dump_recipe
from posttrain.config.needs import Needs
from posttrain.config.preflight import check_needs
from posttrain.errors import NeedsError, RecipeError, RecipeErrors

SAMPLES = Needs(data=("prompts",), rollouts=True, verifier=True, min_samples_per_prompt=2)
ROWS = Needs(data=("completions",))
EVALUATION = "evaluation={benchmarks: [gsm8k], samples: 4, k: [1, 4], top_p: 0.9}"


def check(load, text: str, needs: Needs, *overrides: str) -> None:
    recipe, locations = load(text, *overrides)
    check_needs(recipe, needs, recipe.method.name, locations)


def test_what_is_needed_and_nothing_else_passes(load, online: str, supervised: str) -> None:
    check(load, online, SAMPLES, EVALUATION, "verifier_pool.workers=2", "model.init.tokenizer.alphabet=abc")
    check(load, supervised, ROWS, EVALUATION, "verifier_pool.workers=2", "model.revision=main")


def test_a_dumped_recipe_passes_too(load, online: str, supervised: str) -> None:
    for text, needs in ((online, SAMPLES), (supervised, ROWS)):
        recipe, _ = load(text, "training.lr_scheduler_type=constant", "training.optim=sgd")
        check(load, dump_recipe(recipe), needs)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("rollouts", "method reward needs `rollouts`\n  add, for example:\n    rollouts:\n      samples_per_prompt: 8"),
        ("verifier", "method reward needs `verifier`\n  add, for example:\n    verifier:\n      - type: math"),
        ("data.prompts", "method reward needs `data.prompts`\n  add, for example:\n    data:\n      prompts: {path:"),
        (
            "batch.prompts_per_step",
            "needs `batch.prompts_per_step`\n  add, for example:\n    batch:\n      prompts_per",
        ),
    ],
)
def test_missing_sections_online(load, online: str, section: str, message: str) -> None:
    with pytest.raises(NeedsError) as caught:
        check(load, online, SAMPLES, f"{section}=null")
    assert message in str(caught.value)


def test_missing_sections_supervised(load, supervised: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        check(load, supervised, ROWS, "data.completions=null", "batch.rows_per_step=null")
    assert [error.what for error in caught.value.errors] == [
        "method clone needs `data.completions`",
        "method clone needs `batch.rows_per_step`",
    ]
    check(load, supervised, ROWS, "data.completions={path: traces.jsonl}")  # the columns of the file say the rest


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["rollouts.temperature=0.7"], "rollouts", "clone samples no completions"),
        (["verifier=[{type: math}]"], "verifier", "clone takes no reward"),
        (["batch.prompts_per_step=4"], "batch.prompts_per_step", "clone counts in batch.rows_per_step"),
        (["data.prompts={path: x.jsonl}"], "data.prompts", "clone reads data.completions"),
        (["verifier_pool.workers=2"], "verifier_pool", "nothing is verified"),
        (["data.completions.revision=main"], "data.completions.revision", "traces.jsonl is a local file"),
        (["data.completions.split=test"], "data.completions.split", "traces.jsonl is a local file"),
        (["data.completions.reference_pattern=(x)"], "data.completions.reference_pattern", "no `reference` column"),
        (
            ["data.completions={task: countdown, levels: [3], size: 9, weakness: {error_rate: 0.5}}"],
            "data.completions.weakness",
            "annotator is expert",
        ),
    ],
)
def test_keys_without_effect_supervised(load, supervised: str, overrides: list[str], key: str, reason: str) -> None:
    with pytest.raises(NeedsError) as caught:
        check(load, supervised, ROWS, *overrides)
    assert f"{key}: the key has no effect: " in str(caught.value) and reason in str(caught.value)
    assert caught.value.where.startswith("override ")


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["data.completions={path: x.jsonl, completion: y}"], "data.completions", "reward reads data.prompts"),
        (["batch.rows_per_step=4"], "batch.rows_per_step", "reward counts in batch.prompts_per_step"),
        (["model.revision=main"], "model.revision", "model.init makes one"),
        (["model.trust_remote_code=true"], "model.trust_remote_code", "model.init makes one"),
        (["model.init.tokenizer.vocab_size=400"], "model.init.tokenizer.vocab_size", "a characters tokenizer"),
        (["model.init.tokenizer={type: bpe, alphabet: abc}"], "model.init.tokenizer.alphabet", "a bpe tokenizer"),
        (["training.lr_scheduler_type=constant", "training.warmup_steps=9"], "training.warmup_steps", "has no warmup"),
        (["training.optim=sgd", "training.adam_beta1=0.8"], "training.adam_beta1", "optim sgd is not Adam"),
        (["training.save_total_limit=2"], "training.save_total_limit", "without save_steps"),
        (["data.prompts.annotator=weak"], "data.prompts.annotator", "read in data.completions"),
        (["data.prompts.weakness={error_rate: 0.5}"], "data.prompts.weakness", "read in data.completions"),
    ],
)
def test_keys_without_effect_online(load, online: str, overrides: list[str], key: str, reason: str) -> None:
    with pytest.raises(NeedsError) as caught:
        check(load, online, SAMPLES, *overrides)
    assert f"{key}: the key has no effect: " in str(caught.value) and reason in str(caught.value)


def test_the_line_of_an_ineffective_key_is_named(load, supervised: str) -> None:
    with pytest.raises(NeedsError) as caught:
        check(load, supervised + "rollouts:\n  temperature: 1.0\n", ROWS)
    assert caught.value.where == "recipe.yaml:8: rollouts"


def test_a_weak_annotator_reads_its_parameters(load, supervised: str) -> None:
    source = "{task: countdown, levels: [3], size: 9, annotator: weak, weakness: {error_rate: 0.5}}"
    check(load, supervised, ROWS, f"data.completions={source}")


@pytest.mark.parametrize(
    ("verifiers", "message"),
    [
        ("[{type: format, pattern: x}]", "no verifier here judges the answer: `format` only shapes the reward"),
        ("[{type: procedural}, {type: math}]", "verifier.1: a second verifier judges the answer: procedural and math"),
    ],
)
def test_exactly_one_verifier_judges(load, online: str, verifiers: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(load, online, SAMPLES, f"verifier={verifiers}")
    assert message in str(caught.value)
    check(load, online, SAMPLES, "verifier=[{type: format, pattern: x}, {type: procedural}]")


def test_verifiers_of_benchmarks_are_checked_too(load, online: str) -> None:
    benchmark = "{name: b, data: {path: x.jsonl}, verifier: [{type: math}]}"
    with pytest.raises(NeedsError) as caught:
        check(load, online, SAMPLES, f"evaluation={{benchmarks: [{benchmark}]}}")
    assert "evaluation.benchmarks.0.data: verifier math compares with a gold answer" in str(caught.value)


def test_a_comparing_verifier_needs_a_reference_column(load, online: str) -> None:
    overrides = ["data.prompts={path: x.jsonl}", "verifier=[{type: exact}]"]
    with pytest.raises(NeedsError, match="verifier exact compares with a gold answer"):
        check(load, online, SAMPLES, *overrides)
    check(load, online, SAMPLES, *overrides, "data.prompts.reference=answer")


def test_small_groups_and_large_k(load, online: str) -> None:
    with pytest.raises(NeedsError, match="method reward needs at least 2 samples per prompt, got 1"):
        check(load, online, SAMPLES, "rollouts.samples_per_prompt=1")
    with pytest.raises(RecipeError) as caught:
        check(load, online, SAMPLES, "evaluation={benchmarks: [a], samples: 4, k: [1, 8]}")
    assert "pass@8 needs 1 <= k <= samples, and samples is 4\n  set evaluation.samples to at least 8" in str(
        caught.value
    )


def test_a_majority_of_more_samples_than_there_are(load, online: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(load, online, SAMPLES, "evaluation={benchmarks: [a], samples: 4, maj: [4, 16]}")
    assert "maj@16 needs 1 <= k <= samples, and samples is 4" in str(caught.value)
    assert "set evaluation.samples to at least 16, or lower maj" in str(caught.value)


def test_several_errors_come_together(load, supervised: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        check(load, supervised, SAMPLES, "training.save_total_limit=3")
    text = str(caught.value)
    for part in ("`data.prompts`", "`rollouts`", "`verifier`", "`batch.prompts_per_step`", "data.completions: the key"):
        assert part in text


def test_without_locations_messages_name_keys(load, supervised: str) -> None:
    recipe, _ = load(supervised, "rollouts.temperature=0.5")
    with pytest.raises(NeedsError) as caught:
        check_needs(recipe, ROWS, "clone")
    assert caught.value.where == "recipe: rollouts"
