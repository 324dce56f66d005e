"""A reference that the recipe names: KL to another policy than the start of the run."""

import json

import pytest
import torch
from safetensors.torch import load_file

from posttrain.errors import ModelError, NeedsError, StateError
from posttrain.trainers.run import train

GRPO = {"name": "grpo", "beta": 0.1}
CHORD = {"name": "chord", "expert_rows_per_step": 2, "beta": 0.1}


@pytest.fixture(scope="module")
def cloned(tiny_model, make_recipe_data, tmp_path_factory):
    """A policy that was fine-tuned on an expert's traces."""
    from posttrain.config.schema import Recipe
    from posttrain.methods.sft import SFTConfig

    folder = tmp_path_factory.mktemp("cloned")
    data = make_recipe_data(tiny_model, folder, {"name": "sft"}, {"training.max_steps": 20})
    return train(Recipe(**data | {"method": SFTConfig()})).model_dir


def weights(result):
    return load_file(result.model_dir / "model.safetensors")


def kl(result):
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["kl"] for line in lines if "loss" in line]


def test_the_start_named_by_its_path_is_the_default(load, tiny_model, tmp_path):
    plain = train(load(GRPO, {"output": str(tmp_path / "a")}))
    named = train(load(GRPO, {"output": str(tmp_path / "b"), "reference": {"path": str(tiny_model)}}))
    one, other = weights(plain), weights(named)
    assert all(torch.equal(one[name], other[name]) for name in one) and kl(plain) == kl(named) and kl(plain)[0] == 0


@pytest.mark.parametrize("method", [GRPO, CHORD], ids=["grpo", "chord"])
@pytest.mark.parametrize("peft", [None, {"type": "lora", "r": 4}], ids=["full", "lora"])
def test_the_policy_is_drawn_to_a_cloned_one(method, peft, load, cloned, tmp_path):
    changes = {"reference": {"path": str(cloned)}, "model.peft": peft, "training.max_steps": 12, "seed": 3}
    changes |= {"verifier": [{"type": "procedural"}]}  # never right: nothing but the KL moves the policy
    method = {**method, "beta": 1.0}
    found = kl(train(load(method, changes)))
    assert found[0] > 0.05 and found[-1] < 0.8 * found[0]


def test_another_reference_is_refused_on_resuming(load, cloned, tiny_model, tmp_path):
    changes = {"training.max_steps": 2, "training.save_steps": 2}
    train(load(GRPO, {**changes, "reference": {"path": str(cloned)}}))
    with pytest.raises(StateError, match="content.reference"):
        train(load(GRPO, {"training.max_steps": 4, "reference": {"path": str(tiny_model)}}), resume="auto")


def test_a_reference_of_another_vocabulary_is_refused(load, tmp_path):
    from posttrain.config.schema import ModelConfig
    from posttrain.models.loading import load_policy

    init = {"hidden_size": 16, "heads": 2, "layers": 1, "tokenizer": {"type": "characters", "alphabet": "0123"}}
    model, tokenizer = load_policy(ModelConfig(init=init), seed=0)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="the reference has another vocabulary"):
        train(load(GRPO, {"reference": {"path": str(tmp_path / "small")}}))


@pytest.mark.parametrize(
    ("method", "reference", "says"),
    [
        ({"name": "grpo"}, {"path": "x"}, "grpo has no reference"),
        (GRPO, {"cache": "x"}, "does not score the same rows again"),
        ({"name": "dpo"}, {"path": "x"}, "is the start of the run"),
    ],
)
def test_a_reference_that_nobody_reads_is_refused(method, reference, says, load):
    with pytest.raises(NeedsError, match=says):
        train(load(method, {"reference": reference}))
