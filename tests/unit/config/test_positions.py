"""How long a row may be, from config.json alone."""

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from posttrain.config.loading import load_recipe
from posttrain.config.positions import model_positions, positions_of
from posttrain.config.preflight import check_needs
from posttrain.config.schema import ModelConfig
from posttrain.data.preparation import fit_rows, load_rows
from posttrain.data.rendering import Renderer
from posttrain.errors import DataError, NeedsError
from posttrain.methods import METHODS
from posttrain.models.loading import load_tokenizer

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "config, positions",
    [
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "llama", "max_position_embeddings": 4096}, 4096),
        ({"model_type": "llama", "max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"model_type": "qwen3", "max_position_embeddings": 131072, "rope_parameters": YARN}, 131072),
        (
            {"model_type": "llama", "max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2}},
            4096,
        ),
        ({"model_type": "llama", "max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"model_type": "mamba"}, None),
        ({"model_type": "bloom", "seq_length": 2048}, None),
        ({"model_type": "falcon", "alibi": True, "max_position_embeddings": 2048}, None),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"model_type": "unheard_of"}, None),
    ],
)
def test_positions_of_a_config(config, positions):
    assert positions_of(config) == positions


def test_positions_of_a_recipe(tiny_model, tmp_path):
    assert model_positions(ModelConfig(path=str(tiny_model))) == 96
    assert model_positions(ModelConfig(init={"max_length": 48})) == 48
    assert model_positions(ModelConfig(path=str(tmp_path / "absent"))) is None
    assert model_positions(ModelConfig(path="nobody/has-this")) is None


@pytest.fixture
def recipe_of(make_recipe_data, tiny_model, tmp_path):
    def make(method, changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(make_recipe_data(tiny_model, tmp_path, method, changes)))
        recipe = load_recipe(path, [], {name: each.Config for name, each in METHODS.items()})
        return recipe, METHODS[method["name"]](recipe.method).needs

    return make


@pytest.mark.parametrize(
    "method, changes, says",
    [
        ("sft", {"data.max_length": 97}, "data.max_length is 97, and the model reads at most 96 tokens"),
        ("dpo", {"data.max_length": 4096}, "data.max_length is 4,096"),
        ("grpo", {"data.max_prompt_length": 90}, "data.max_prompt_length is 90 and rollouts.max_new_tokens 10"),
        ("grpo", {"rollouts.max_new_tokens": 96}, "rollouts.max_new_tokens is 96"),
        ("sft", {"data.max_length": 300, "model": {"init": {"max_length": 128}}}, "at most 128 tokens"),
    ],
)
def test_limits_beyond_the_model_are_refused_with_the_number(recipe_of, method, changes, says):
    recipe, needs = recipe_of({"name": method}, changes)
    with pytest.raises(NeedsError, match=says):
        check_needs(recipe, needs, method)


@pytest.mark.parametrize(
    "method, changes",
    [("sft", {"data.max_length": 96}), ("grpo", {"data.max_prompt_length": 86}), ("dpo", {})],
)
def test_limits_within_it_pass(recipe_of, method, changes):
    recipe, needs = recipe_of({"name": method}, changes)
    check_needs(recipe, needs, method)


def test_longer_rows_are_left_out_by_default(recipe_of, tiny_model, tmp_path):
    """A model with learnt positions would end with an IndexError, one with rotary ones would be trained beyond them."""
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    changes = {"model.path": str(tmp_path / "gpt2"), "data.max_lost_share": 1.0}
    recipe, needs = recipe_of({"name": "sft"}, changes)
    rows = load_rows(recipe, needs)
    fitted, ledger = fit_rows(recipe, needs, rows, Renderer(tokenizer))
    assert max(len(sample.ids) for sample in fitted) <= 24 and 0 < len(fitted) < len(rows)
    recipe, needs = recipe_of({"name": "sft"}, {**changes, "data.max_lost_share": 0.0})
    with pytest.raises(DataError):
        fit_rows(recipe, needs, rows, Renderer(tokenizer))
