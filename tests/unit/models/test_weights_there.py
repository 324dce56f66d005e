"""`check` tells from headers alone whether a start holds its weights, as loading them does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.weights_there import INDEX, NORMS_OF_LAYER, check_weights, needed_weights

SETTINGS = [(kind, {}) for kind in NORMS_OF_LAYER] + [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 16, "num_hidden_layers": 3}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("kind", "changes"), SETTINGS, ids=lambda value: str(value))
def test_names_and_shapes_are_those_of_the_model(kind, changes, small_causal):
    config = small_causal.small_config(kind, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert dict(needed_weights(config)) == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("model_type", sorted(NORMS_OF_LAYER))
def test_whole_folders_pass_in_every_form(model_type, small_causal, tmp_path):
    model = small_causal.build(model_type)
    forms = {"whole": model, "trunk": model.model, "shards": model}
    for name, form in forms.items():
        form.save_pretrained(tmp_path / name, max_shard_size="20KB" if name == "shards" else "5GB")
    tied = model.config.tie_word_embeddings
    assert (tmp_path / "shards" / INDEX).is_file()
    for name in forms:
        path = ModelConfig(path=str(tmp_path / name))
        assert check_weights(path, classifier=True) is None
        if name == "trunk" and not tied:
            with pytest.raises(ModelError, match=r"lacks 1 weights of its .* model: lm_head.weight"):
                check_weights(path, classifier=False)
        else:
            assert check_weights(path, classifier=False) is None


def test_types_outside_the_table_are_left_to_loading(small_causal, tmp_path):
    undecided = [kind for kind in small_causal.TYPES if kind not in NORMS_OF_LAYER]
    kinds = ["gpt2", "mixtral", "mamba", "gemma3", "deepseek_v3"]
    assert set(kinds) <= set(undecided)
    for kind in kinds:
        small_causal.small_config(kind).save_pretrained(tmp_path / kind)
        assert "loading them tells" in check_weights(ModelConfig(path=str(tmp_path / kind)), classifier=False)


def test_a_classifier_is_a_start_for_one_and_for_a_policy_with_a_tied_head(small_causal, tmp_path):
    for tied in (True, False):
        folder = tmp_path / str(tied)
        config = small_causal.small_config("llama", tie_word_embeddings=tied, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        assert check_weights(ModelConfig(path=str(folder)), classifier=True) is None
        if not tied:
            with pytest.raises(ModelError, match="lm_head.weight"):
                check_weights(ModelConfig(path=str(folder)), classifier=False)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_check_and_train_refuse_a_weight_of_another_shape(name, tiny_model, tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    for file in tiny_model.iterdir():
        (start / file.name).write_bytes(file.read_bytes())
    weights = load_file(start / "model.safetensors")
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    model = ModelConfig(path=str(start))
    with pytest.raises(ModelError, match=f"{name} has the shape"):
        check_weights(model, classifier=False)
    for load in (load_policy, load_classifier):
        with pytest.raises(ModelError, match=f"{name} has the shape"):
            load(model, seed=0)
