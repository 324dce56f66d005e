"""The routers' load-balancing loss within a run."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config.model_types import unbalanced_notes
from posttrain.contract.shell import metrics
from posttrain.errors import NeedsError, RecipeErrors
from posttrain.methods import METHODS
from posttrain.trainers.rows import refuse
from posttrain.trainers.run import train

DESCENT = {"training.optim": "sgd", "training.learning_rate": 0.5, "training.max_grad_norm": 0.0}
GRPO = {"name": "grpo", "beta": 0.1}


@pytest.fixture(scope="module")
def experts(small_causal, tiny_model, tmp_path_factory):
    """A folder with a tiny Mixtral whose config asks for its loss, with the tokenizer of `tiny_model`."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 96, "bos_token_id": None}
    model = small_causal.build("mixtral", output_router_logits=True, router_aux_loss_coef=0.25, **sizes, **ends)
    model.save_pretrained(folder)
    return folder


def run(load, method, out, changes):
    result = train(load(method, {**DESCENT, "output": str(out), **changes}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(result.model_dir / "model.safetensors"), [line for line in lines if "loss" in line]


STEPS = {"name": "dapo_step", "delimiter": ";", "beta": 0.5}
HYPO = pytest.param({"name": "hypo", "lam": 0.05}, marks=pytest.mark.slow)  # its samples are rows of their own
BALANCED = [{"name": "sft"}, GRPO, STEPS, HYPO]


@pytest.mark.parametrize("method", BALANCED, ids=lambda method: method["name"])
def test_any_micro_batch_balances_alike(method, load, experts, tmp_path):
    found = {}
    for name, micro_batch, coefficient in (("whole", 16, 1.0), ("split", 4, 1.0), ("without", 16, 0.0)):
        changes = {"model.path": str(experts), "batch.micro_batch": micro_batch, "model.router_loss": coefficient}
        found[name] = run(load, method, tmp_path / name, changes | {"training.max_steps": 2})
    whole, split, without = found["whole"], found["split"], found["without"]
    apart = max((whole[0][name] - without[0][name]).abs().max().item() for name in whole[0])
    for name, tensor in whole[0].items():
        torch.testing.assert_close(split[0][name], tensor, rtol=0, atol=2e-3 * apart)
    for one, other, plain in zip(whole[1], split[1], without[1], strict=True):
        assert one["router_loss"] == pytest.approx(other["router_loss"], rel=1e-5) and one["router_loss"] >= 1.0
        assert one["busiest_expert_share"] == pytest.approx(other["busiest_expert_share"])
        assert 0.25 <= one["busiest_expert_share"] <= 0.5
        assert "router_loss" not in plain
    assert whole[1][0]["loss"] == pytest.approx(without[1][0]["loss"] + whole[1][0]["router_loss"], rel=1e-4)


def test_the_models_config_is_asked_where_the_recipe_says_nothing(load, experts, tmp_path, capsys):
    lora = {"model.peft": {"type": "lora", "r": 2, "target_modules": ["q_proj"]}, "training.max_steps": 1}
    _, lines = run(load, {"name": "sft"}, tmp_path / "run", {"model.path": str(experts)} | lora)
    said = capsys.readouterr().out
    assert "load-balancing loss is trained with coefficient 0.25; routers without an adapter are frozen" in said
    assert lines[0]["router_loss"] >= 1.0
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["router_aux_loss_coef"] == 0.25 and saved["output_router_logits"] is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.output_router_logits


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({"name": "sft"}, {"model.router_loss": 0.01}, "'llama' have no load-balancing loss"),
        ({"name": "reward"}, {"model.router_loss": 0.01}, "trains a classifier"),
    ],
)
def test_it_is_refused_where_there_is_none(method, changes, message, load):
    with pytest.raises((NeedsError, RecipeErrors), match=message):
        recipe = load(method, changes)
        refuse(recipe, METHODS[recipe.method.name](recipe.method))


def test_two_ranks_balance_as_one(load, experts, make_recipe_data, on_two_ranks, tmp_path):
    """Several micro-batches on each rank: the loss is that of the whole step."""
    changes = {"training.max_steps": 2, "model.router_loss": 1.0, "model.path": str(experts)}
    alone, lines = run(load, GRPO, tmp_path / "alone", changes | {"batch.micro_batch": 16})
    two = {**DESCENT, **changes, "batch.micro_batch": 4, "output": str(tmp_path / "two")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(make_recipe_data(experts, tmp_path, GRPO, two)))
    on_two_ranks(tmp_path / "two.yaml")
    start = load_file(experts / "model.safetensors")
    moved = max((alone[name] - start[name]).abs().max().item() for name in alone)
    for name, tensor in load_file(tmp_path / "two" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=2e-3 * moved)
    for one, other in zip(lines, metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "router_loss", "busiest_expert_share"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ({"name": "reward"}, {}, "the classifier's routers train without a load-balancing loss"),
        ({"name": "ppo"}, {}, "the critic's routers train without a load-balancing loss"),
        ({"name": "ppo"}, {"critic.trunk": "shared"}, None),  # they are the policy's
        ({"name": "sft"}, {}, None),
    ],
)
def test_who_else_has_routers_is_told_that_they_have_no_loss(method, changes, says, load, experts):
    recipe = load(method, {"model.path": str(experts), **changes})
    notes = unbalanced_notes(recipe, METHODS[recipe.method.name](recipe.method).needs)
    assert [note.startswith(str(says)) for note in notes] == ([] if says is None else [True])
