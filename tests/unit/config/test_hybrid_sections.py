"""Traces, expert rows, stale rollouts and replay in recipes: what is planned, estimated and refused."""

from __future__ import annotations

import pytest

from posttrain.config.batch import plan_batch, sequence_tokens
from posttrain.config.loading import dump_recipe
from posttrain.config.memory import estimate_memory
from posttrain.config.needs import Needs
from posttrain.config.preflight import check_needs
from posttrain.errors import BatchError, NeedsError, RecipeError

PLAIN = Needs(data=("prompts",), rollouts=True, verifier=True, min_samples_per_prompt=2)
MIXED = Needs(data=("prompts", "traces"), rollouts=True, verifier=True, expert_rows=6)
TRACES = "data.traces={path: traces.jsonl, per_problem: 2}"
STALE = ("rollouts.sync_every=4", "rollouts.delay=2", "rollouts.replay={size: 16, share: 0.25}")


def check(load, text: str, needs: Needs, *overrides: str) -> None:
    recipe, locations = load(text, *overrides)
    check_needs(recipe, needs, recipe.method.name, locations)


def test_expert_rows_have_passes_of_their_own(load, online: str) -> None:
    recipe, _ = load(online, TRACES)
    plan = plan_batch(recipe, MIXED, world_size=2, rows=64)
    assert (plan.sequences_per_rank, plan.expert_rows_per_rank, plan.gradient_accumulation_steps) == (16, 3, 4 + 1)
    assert plan.total_sequences == 5 * (32 + 6)
    table = {label: (value, how) for label, value, how in plan.table()}
    assert table["expert rows per step"] == ("6", "method; drawn from data.traces")
    assert table["accumulation steps"][1].endswith("+ expert rows per rank / micro batch, rounded up")
    assert "expert rows per step" not in {
        label for label, _, _ in plan_batch(recipe, PLAIN, world_size=1, rows=64).table()
    }


def test_expert_rows_divide_by_the_ranks(load, online: str) -> None:
    with pytest.raises(BatchError, match="6 expert rows per step do not divide by 4 ranks") as caught:
        plan_batch(load(online, TRACES)[0], MIXED, world_size=4, rows=64)
    assert "nearest: 4 or 8 expert rows" in str(caught.value)


def test_replayed_prompts_are_a_part_of_the_step(load, online: str) -> None:
    recipe, _ = load(online, STALE[2], "training.max_steps=null", "training.num_train_epochs=2")
    plan = plan_batch(recipe, PLAIN, world_size=2, rows=64)
    assert plan.replayed == 2 and plan.sequences_per_step == 32
    assert plan.max_steps == 21  # 8 fresh prompts in the first step, 6 in each of 20 more: two passes over 64
    table = {label: value for label, value, _ in plan.table()}
    assert table["of them replayed"] == "2"


@pytest.mark.parametrize(
    ("replay", "world_size", "says"),
    [
        ("{size: 16, share: 0.01}", 1, "nearest: share 0.125 or 0.25"),
        ("{size: 16, share: 0.99}", 1, "nearest: share 0.75 or 0.875"),
        ("{size: 16, share: 0.375}", 2, "nearest: share 0.25 or 0.5"),
        ("{size: 3, share: 0.5}", 1, "raise size to at least 4"),
    ],
)
def test_replay_that_cannot_be_is_refused(load, online: str, replay: str, world_size: int, says: str) -> None:
    recipe, locations = load(online, f"rollouts.replay={replay}")
    with pytest.raises(BatchError) as caught:
        plan_batch(recipe, PLAIN, world_size=world_size, rows=64, locations=locations)
    assert says in str(caught.value) and "rollouts.replay" in str(caught.value)


def test_prompt_limits_do_not_bound_traces(load, online: str) -> None:
    recipe, _ = load(online, TRACES, "data.max_prompt_length=40", "model.init.max_length=400")
    assert sequence_tokens(recipe, PLAIN) == 104 and sequence_tokens(recipe, MIXED) == 400


def test_a_lagging_policy_is_a_copy_of_what_is_trained(load, online: str) -> None:
    def fixed(*overrides: str) -> dict[str, int]:
        estimate = estimate_memory(
            load(online, *overrides)[0], PLAIN, sequence_tokens=64, sequences_per_rank=8, device="cpu"
        )
        return {name: size for name, size, _ in estimate.fixed}

    assert fixed("rollouts.sync_every=2")["sampling policy"] == fixed()["gradients"]
    assert "sampling policy" not in fixed("rollouts.delay=2")
    lora = fixed("rollouts.sync_every=2", "model.peft={r: 2}")
    assert lora["sampling policy"] == lora["adapter"] < fixed()["weights"]


def test_traces_are_asked_for_by_those_who_read_them(load, online: str, supervised: str) -> None:
    check(load, online, MIXED, TRACES, *STALE)
    with pytest.raises(NeedsError, match="method reward needs `data.traces`") as caught:
        check(load, online, MIXED)
    assert "traces: {path: traces.jsonl}" in str(caught.value)
    with pytest.raises(NeedsError, match="the key has no effect: reward reads data.prompts"):
        check(load, online, PLAIN, TRACES)
    either = Needs(data=("completions",), traces_instead=True)
    check(load, supervised, either)
    check(load, supervised, either, TRACES, "data.completions=null")
    with pytest.raises(NeedsError, match="clone reads data.completions or data.traces, one of them"):
        check(load, supervised, either, TRACES)
    with pytest.raises(NeedsError, match="needs `data.completions`"):
        check(load, supervised, either, "data.completions=null")


def test_weights_are_read_by_methods_that_draw_traces(load, online: str) -> None:
    weighted = "data.traces={path: traces.jsonl, weights: {alpha: 0.5}}"
    check(load, online, MIXED, weighted)
    prefixes = Needs(data=("prompts", "traces"), rollouts=True, verifier=True)
    with pytest.raises(NeedsError, match="reward does not draw traces by weight"):
        check(load, online, prefixes, weighted)


@pytest.mark.parametrize("key", ["sync_every=2", "delay=1", "replay={size: 4, share: 0.5}"])
def test_methods_that_sample_only_to_measure_have_no_stale_rollouts(load, online: str, key: str) -> None:
    needs = Needs(data=("prompts",), samples=1)
    with pytest.raises(RecipeError, match="samples from the policy as it is"):
        check(load, online, needs, f"rollouts.{key}", "verifier=null", "batch={rows_per_step: 8, micro_batch: 4}")


@pytest.mark.parametrize(
    "traces",
    [
        TRACES,
        "data.traces={path: [a.jsonl, b.jsonl], keep: all, weights: {by: return}}",
        "data.traces={path: a.jsonl, completion: solution}",
        "data.traces={task: chain_sum, levels: [2], size: 64, annotator: weak}",
    ],
)
def test_a_dumped_source_reads_back_as_it_was(load, online: str, traces: str) -> None:
    recipe, _ = load(online, traces)
    again, locations = load(dump_recipe(recipe))
    assert again.data.traces == recipe.data.traces and type(again.data.traces) is type(recipe.data.traces)
    check_needs(again, MIXED, "reward", locations)
