"""A run that is evaluated on the way names its best step by the recipe's rule."""

import json

import pytest

from posttrain.errors import RecipeError
from posttrain.trainers.run import train

MEASURED = {"every": 1, "benchmarks": ["chain-sum-3"], "limit": 4, "max_new_tokens": 8}


def test_the_best_step_is_written(load):
    rule = {"benchmark": "chain-sum-3", "measure": "greedy"}
    result = train(load({"name": "sft"}, {"training.max_steps": 2, "evaluation": {**MEASURED, "best": rule}}))
    best = json.loads((result.run_dir / "best.json").read_text())
    # A random model gets nothing right, so all steps are equal and the earliest is taken.
    assert best["rule"] == rule and best["step"] == 0 and best["measured"]["value"] == 0
    assert best["not_worse"] == [1, 2]


def test_a_rule_that_cannot_be_applied_is_refused_before_training(load):
    rule = {"benchmark": "chain-sum-4", "measure": "greedy"}
    with pytest.raises(RecipeError, match="not evaluated"):
        train(load({"name": "sft"}, {"evaluation": {**MEASURED, "best": rule}}))
