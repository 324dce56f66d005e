"""Runs that are made to go wrong, and the alarm that each must ring. Healthy ones: `test_rows.py` and `tests/real`."""

import json

import pytest

import posttrain as pt
from posttrain.contract.recipes import tiny_recipe, write_model

REWARDS = '''
def constant(completion):
    """All answers alike."""
    return 1.0


def broken(completion):
    """Fails on most answers."""
    raise ValueError("it is broken")


def last_digit(completion):
    """Something to learn."""
    return sum(each in "01234" for each in completion) / 10
'''


def rewarded(name):
    return [{"type": "python", "function": f"rewards.py:{name}"}]


SLOW = {"training.learning_rate": 1e-3}
RUNS = {
    "one reward for all": (
        {"name": "grpo"},
        {"verifier": rewarded("constant"), "rollouts.refill": {"waves": 2}, "training.max_steps": 6},
        {"informative_groups low", "grad_norm low", "refill/filled_share low"},
    ),
    "a verifier that fails": (
        {"name": "grpo"},
        {"verifier": rewarded("broken"), "training.max_steps": 3},
        {"unknown_share high"},
    ),
    "no room to answer": (
        {"name": "grpo"},
        {"verifier": rewarded("last_digit"), "rollouts.max_new_tokens": 1, "training.max_steps": 4} | SLOW,
        {"truncated_share high", "completion_length low"},
    ),
    "old rollouts and long steps": (
        {"name": "grpo", "beta": 0.1},
        {
            "verifier": rewarded("last_digit"),
            "rollouts.sync_every": 12,
            "training.max_steps": 12,
            "training.learning_rate": 0.1,
        },
        {"kl high", "approx_kl high"},
    ),
    "one text by heart": (
        {"name": "sft"},
        {
            "data.completions": {"path": "same.jsonl", "chat": False},
            "training.max_steps": 40,
            "training.learning_rate": 0.1,
        },
        {"entropy low"},
    ),
    "pairs at a large rate": (
        {"name": "dpo"},
        {
            "training.max_steps": 8,
            "training.learning_rate": 0.1,
            "evaluation": {"every": 2, "max_new_tokens": 16, "preferences": {"share": 0.2}},
        },
        {"pairs/chosen_shift low", "held_out/chosen_shift low"},
    ),
}
"""What is wrong -> method, changes to a tiny recipe, and the alarms that must ring."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("wrong", RUNS)
def test_what_goes_wrong_rings(wrong, model, tmp_path, monkeypatch):
    method, changes, alarms = RUNS[wrong]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "same.jsonl").write_text(16 * (json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n"))
    recipe = tiny_recipe(method, tmp_path, model, {"tracking.console": "off", **changes})
    run = pt.load_run(pt.train(recipe).run_dir)
    assert alarms <= {alarm["alarm"] for alarm in run.alarms}
