from __future__ import annotations

from dataclasses import replace

import pytest

from posttrain.config.batch import plan_batch, sequence_tokens
from posttrain.config.needs import Needs
from posttrain.errors import BatchError

SAMPLES = Needs(data=("prompts",), rollouts=True, verifier=True, min_samples_per_prompt=2)
ROWS = Needs(data=("completions",))


def test_online_numbers(load, online: str) -> None:
    recipe, _ = load(online)
    plan = plan_batch(recipe, SAMPLES, world_size=2, rows=64)
    assert (plan.sequences_per_step, plan.sequences_per_rank, plan.gradient_accumulation_steps) == (32, 16, 4)
    assert (plan.max_steps, plan.total_sequences) == (5, 160)
    # model.init has 512 positions; no prompt limit is given
    assert plan.sequence_tokens == 512 and plan.max_tokens == 160 * 512


@pytest.mark.parametrize(
    ("epochs", "rows", "per_step", "steps"),
    [(2, 100, 16, 13), (1, 16, 16, 1), (1, 17, 16, 2), (0.5, 64, 16, 2), (0.1, 160, 16, 1), (3, 16, 16, 3)],
)
def test_steps_from_epochs(load, supervised: str, epochs: float, rows: int, per_step: int, steps: int) -> None:
    recipe, _ = load(supervised, f"training.num_train_epochs={epochs}", f"batch.rows_per_step={per_step}")
    plan = plan_batch(recipe, ROWS, world_size=1, rows=rows)
    assert plan.max_steps == steps and plan.sequences_per_unit == 1


def test_steps_are_unknown_until_rows_are_counted(load, supervised: str) -> None:
    recipe, _ = load(supervised)
    plan = plan_batch(recipe, ROWS, world_size=1, rows=None)
    assert plan.max_steps is None and plan.total_sequences is None and plan.max_tokens is None
    table = {label: (value, how) for label, value, how in plan.table()}
    assert table["optimizer steps"] == ("not known", "2 epochs x rows in the data / rows per step, rounded up")
    assert table["rows per step"] == ("16", "batch.rows_per_step")
    assert "samples per prompt" not in table


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], 512),
        (["data.max_length=100"], 100),
        (["data.max_prompt_length=40"], 104),
        (["data.max_prompt_length=40", "data.max_length=90"], 90),
        (["model.init.max_length=80", "data.max_prompt_length=40"], 80),
        (["model={path: x}"], None),
    ],
)
def test_longest_sequence(load, online: str, overrides: list[str], tokens: int | None) -> None:
    assert sequence_tokens(load(online, *overrides)[0], SAMPLES) == tokens


@pytest.mark.parametrize(
    ("prompts", "samples", "micro_batch", "world_size", "message", "hint"),
    [
        (
            8,
            4,
            6,
            1,
            "8 prompts x 4 samples = 32 sequences per step do not divide into micro-batches of 6",
            "nearest: prompts_per_step 6 or 9 with micro_batch 6, or micro_batch 4 or 8 with prompts_per_step 8",
        ),
        (
            8,
            4,
            6,
            2,
            "do not divide into micro-batches of 6 on each of 2 ranks",
            "nearest: prompts_per_step 6 or 12 with micro_batch 6, or micro_batch 4 or 8 with prompts_per_step 8",
        ),
        (
            8,
            4,
            4,
            3,
            "8 prompts per step do not divide by 3 ranks; the samples of a prompt stay on one rank",
            "nearest: prompts_per_step 6 or 9 with micro_batch 4",
        ),
        # 32 sequences would divide by 8 ranks x 4, but half a group per rank is not allowed
        (4, 8, 4, 8, "4 prompts per step do not divide by 8 ranks", "nearest: prompts_per_step 8 with micro_batch 4"),
        (
            2,
            3,
            64,
            1,
            "2 prompts x 3 samples = 6 sequences",
            "prompts_per_step 64 with micro_batch 64, or micro_batch 6 with",
        ),
    ],
)
def test_impossible_online_numbers(
    load, online: str, prompts: int, samples: int, micro_batch: int, world_size: int, message: str, hint: str
) -> None:
    recipe, locations = load(
        online,
        f"batch.prompts_per_step={prompts}",
        f"batch.micro_batch={micro_batch}",
        f"rollouts.samples_per_prompt={samples}",
    )
    with pytest.raises(BatchError) as caught:
        plan_batch(recipe, SAMPLES, world_size=world_size, rows=None, locations=locations)
    assert message in caught.value.what and hint in caught.value.hint
    assert caught.value.where.startswith("override 'batch.")


def test_advice_is_valid(load, online: str) -> None:
    """Every number that an error proposes is accepted, for many combinations."""
    import re

    refused = 0
    for prompts in (1, 5, 8, 12):
        for samples in (2, 3, 8):
            for micro_batch in (1, 3, 4, 16):
                for world_size in (1, 2, 6):
                    recipe, _ = load(
                        online,
                        f"batch={{prompts_per_step: {prompts}, micro_batch: {micro_batch}}}",
                        f"rollouts.samples_per_prompt={samples}",
                    )
                    try:
                        plan_batch(recipe, SAMPLES, world_size=world_size, rows=None)
                    except BatchError as error:
                        refused += 1
                        proposals = re.findall(r"(\w+) (\d+)(?: or (\d+))? with (\w+) (\d+)", error.hint)
                        assert proposals
                        for key, low, high, other, fixed in proposals:
                            for value in filter(None, (low, high)):
                                batch = recipe.batch.model_copy(update={key: int(value), other: int(fixed)})
                                mended = recipe.model_copy(update={"batch": batch})
                                plan_batch(mended, SAMPLES, world_size=world_size, rows=None)
    assert refused > 50


def test_impossible_supervised_numbers(load, supervised: str) -> None:
    recipe, locations = load(supervised, "batch.rows_per_step=20")
    with pytest.raises(BatchError) as caught:
        plan_batch(recipe, ROWS, world_size=1, rows=None, locations=locations)
    assert caught.value.what == "20 rows per step do not divide into micro-batches of 8"
    assert caught.value.hint == (
        "nearest: rows_per_step 16 or 24 with micro_batch 8, or micro_batch 5 or 10 with rows_per_step 20"
    )
    assert caught.value.where == "recipe.yaml:5: batch.micro_batch"


def test_a_step_larger_than_the_data(load, supervised: str) -> None:
    recipe, _ = load(supervised)
    with pytest.raises(BatchError, match="a step takes 16 rows, and the data has 10") as caught:
        plan_batch(recipe, ROWS, world_size=1, rows=10)
    assert caught.value.hint == "nearest: rows_per_step 8 with micro_batch 8"
    with pytest.raises(BatchError) as caught:
        plan_batch(recipe, ROWS, world_size=1, rows=3)
    assert caught.value.hint == "give more data or a smaller batch"


def test_a_recipe_that_was_not_checked_is_a_defect(load, supervised: str) -> None:
    recipe, _ = load(supervised)
    with pytest.raises(ValueError, match="check_needs"):
        plan_batch(recipe, SAMPLES, world_size=1, rows=None)


def test_minibatches_multiply_the_prompts_of_a_rollout_and_leave_the_step_as_it_is(load, online: str) -> None:
    recipe, _ = load(online)
    plan = plan_batch(recipe, replace(SAMPLES, minibatches=4), world_size=2, rows=64)
    one = plan_batch(recipe, SAMPLES, world_size=2, rows=64)
    assert plan.prompts_per_rollout == 4 * one.units_per_step == 4 * one.prompts_per_rollout
    assert plan.gradient_accumulation_steps == one.gradient_accumulation_steps
    assert ("prompts per rollout", "32", "prompts per step x method.minibatches") in plan.table()
    with pytest.raises(BatchError, match="takes 32 prompts, 8 for each of 4 minibatches, and the data has 31") as error:
        plan_batch(recipe, replace(SAMPLES, minibatches=4), world_size=2, rows=31)
    assert "lower it to 3" in error.value.hint
