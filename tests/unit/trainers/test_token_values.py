"""`tokens.jsonl` agrees with what else a run writes, and stays within its budget."""

import json
import math

import pytest

import posttrain as pt
from posttrain.contract.recipes import tiny_recipe, write_model
from posttrain.errors import RecipeError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trained(model, tmp_path):
    """`trained(method, changes)`: a run of it, and its samples and tokens."""

    def train(method, changes):
        recipe = tiny_recipe(method, tmp_path, model, {"tracking.console": "off", **changes})
        return pt.load_run(pt.train(recipe).run_dir)

    return train


def test_samples_token_by_token(trained):
    changes = {"training.max_steps": 6, "rollouts.samples_per_prompt": 4, "batch.prompts_per_step": 8}
    run = trained({"name": "grpo", "updates_per_rollout": 2, "beta": 0.1}, changes)
    assert {entry["step"] - entry["rollout"] for entry in run.tokens} == {1}  # in the last update on a rollout
    for entry in run.tokens:
        sample = [each for each in run.samples if each["step"] == entry["rollout"]][entry["place"]]
        shown = "".join(text for text in entry["text"] if not text.startswith("<"))
        assert shown == sample["completion"] and all(entry["trained"]) and "cut" not in entry
        assert entry["advantage"] == pytest.approx([sample["advantage"]] * len(entry["text"]), abs=1e-3)
        assert all(-9 < logp < 0 for logp in entry["logp"])
        if entry["rollout"] == 0:  # where the start, which is the reference, has sampled
            assert entry["ratio"] == pytest.approx(entry["ratio_to_reference"], abs=1e-3)
    assert any(abs(ratio - 1) > 1e-3 for entry in run.tokens for ratio in entry["ratio"])


def test_pairs_token_by_token(trained):
    run = trained({"name": "dpo"}, {"training.max_steps": 2})
    first = [entry for entry in run.tokens if entry["step"] == 0]
    assert [entry["margin"] for entry in first] == pytest.approx([0.0] * len(first), abs=1e-4)
    for entry in run.tokens:
        sums = [sum(entry[role]["reward"]) for role in ("chosen", "rejected")]
        if not any("cut" in entry[role] for role in ("chosen", "rejected")):
            assert entry["margin"] == pytest.approx(sums[0] - sums[1], abs=2e-3)
    second = [entry for entry in run.tokens if entry["step"] == 1]
    assert len(second) == 16  # the whole step, so their mean is what was logged
    margin = math.fsum(entry["margin"] for entry in second) / len(second)
    assert run.metrics[1]["pairs/margin"] == pytest.approx(0.1 * margin, rel=1e-2)


def test_held_out_pairs_are_the_same_at_each_evaluation(trained):
    held = {"every": 2, "max_new_tokens": 8, "preferences": {"share": 0.2}}
    run = trained({"name": "dpo"}, {"training.max_steps": 4, "training.learning_rate": 0.01, "evaluation": held})
    found = [entry for entry in run.tokens if "held_out" in entry]
    assert {(entry["held_out"], entry["step"]) for entry in found} == {(0, 0), (2, 1), (4, 3)}
    first, last = ([entry for entry in found if entry["held_out"] == step] for step in (0, 4))
    assert [entry["prompt"] for entry in first] == [entry["prompt"] for entry in last]
    assert all(abs(entry["margin"]) < 1e-4 for entry in first)
    margins = json.loads((run.folder / "held_out" / "step-000004.json").read_text())["rows"]["margins"]
    assert [entry["margin"] for entry in last] == pytest.approx(margins[: len(last)], rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(("budget", "steps"), [(0, set()), (40, {0}), (1024, {0, 3}), (10_000, set(range(6)))])
def test_the_budget_is_spread_over_the_run(trained, budget, steps):
    run = trained({"name": "sft"}, {"training.max_steps": 6, "tracking.token_values": budget})
    assert {entry["step"] for entry in run.tokens} == steps
    assert sum(len(entry["completion"]["text"]) for entry in run.tokens) <= budget


def test_a_classifier_has_none(trained):
    with pytest.raises(RecipeError, match=r"tracking\.token_values"):
        trained({"name": "reward"}, {"tracking.token_values": 100})
