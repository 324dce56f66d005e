"""A reward model trained on pairs as the reward of DR-PO and PPO, alone and beside a verifier; and a critic from it."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.config.loading import load_recipe
from posttrain.config.schema import TaskSource, VerifierPoolConfig
from posttrain.data.tasks import generate_examples
from posttrain.methods import METHODS
from posttrain.trainers.run import train
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.procedural import ProceduralVerifier
from posttrain.verifiers.reward_model import RewardModelVerifier

RATE = 1e-3


@pytest.fixture(scope="module")
def reward_model(make_recipe_data, tiny_model, tmp_path_factory):
    """A folder: trained on pairs until its outputs differ."""
    folder = tmp_path_factory.mktemp("reward")
    path = folder / "recipe.yaml"
    data = make_recipe_data(tiny_model, folder, {"name": "reward"}, {"training.max_steps": 10})
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return train(load_recipe(path, [], {name: cls.Config for name, cls in METHODS.items()})).model_dir


@pytest.fixture(scope="module")
def output(reward_model):
    """`output(text)` -> what the reward model says of a whole text, asked directly."""
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)

    def ask(text):
        with torch.inference_mode():
            return model(torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])).logits[0, 0].item()

    return ask


def sections(folder):
    procedural = {"type": "procedural", "weight": 2.0}
    return procedural, {"type": "reward_model", "path": str(folder), "transform": "none"}


def rollouts(run_dir):
    """The completions that a run wrote down, with their texts whole."""
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [(row, row["prompt"] + row.get("prefix", "") + row["completion"]) for row in rows]


def test_drpo_as_in_its_paper(load, weights, metrics, reward_model, output):
    """Rewarded by the reward model alone, which the critic starts from too."""
    (_, learnt), critic = sections(reward_model), {"path": str(reward_model), "learning_rate": RATE}
    changes = {"verifier": [learnt], "critic": critic, "training.max_steps": 2}
    result = train(load({"name": "drpo", "epochs": 1}, changes))
    found = rollouts(result.run_dir)
    assert [row["reward"] for row, _ in found] == pytest.approx([output(text) for _, text in found], abs=1e-4)
    assert len({row["reward"] for row, _ in found}) > 2 and any("prefix" in row for row, _ in found)
    assert all("reward/reset" in row for row in metrics(result.run_dir))
    start, end = weights(reward_model), weights(result.run_dir / "critic")
    assert start.keys() == end.keys() and start["score.weight"].abs().max() > 4 * RATE
    distances = [float((start[name] - end[name]).abs().max()) for name in start]
    assert 0 < max(distances) < 3 * RATE  # two updates by Adam behind it, no more


def test_ppo_is_rewarded_by_the_weighted_sum_of_a_verifier_and_a_reward_model(load, metrics, reward_model, output):
    procedural, learnt = sections(reward_model)
    verifiers = [procedural, {**learnt, "outcome": False, "weight": 0.5}]
    result = train(load({"name": "ppo", "epochs": 2}, {"verifier": verifiers, "training.max_steps": 2}))
    found = rollouts(result.run_dir)
    expected = [2.0 * (row["verdict"] == "correct") + 0.5 * output(text) for row, text in found]
    assert [row["reward"] for row, _ in found] == pytest.approx(expected, abs=1e-4) and len(set(expected)) > 2
    first = metrics(result.run_dir)[0]
    assert first["accuracy"] == first.get("verdict/correct", 0.0)  # the verifier's word alone


def test_right_and_wrong_answers_get_the_sum_of_both(reward_model, output):
    """A random policy is never right, so the verifier's part is looked at here."""
    procedural, learnt = sections(reward_model)
    configs = [
        ProceduralVerifier.Config(**procedural),
        RewardModelVerifier.Config(**learnt, outcome=False, weight=0.5),
    ]
    judge = build_judge(configs, VerifierPoolConfig(workers=0))
    (example,) = generate_examples(TaskSource(task="chain_sum", levels=[2], size=1), "one")
    texts = {example.completion: 2.0, example.completion[:-1] + "+": 0.0}
    found = judge.judge([example.problem] * 2, list(texts))
    expected = [part + 0.5 * output(example.problem.prompt + text) for text, part in texts.items()]
    assert [judgement.reward for judgement in found] == pytest.approx(expected, abs=1e-4)
    assert [judgement.outcome for judgement in found] == [1.0, 0.0]
    judge.close()
