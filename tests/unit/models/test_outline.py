"""An outline is the model in all but its numbers: what a rank that is given its part relies on."""

import pytest
from peft import get_peft_model

from posttrain.config.schema import Lora, ModelConfig
from posttrain.models.adapters import lora_config
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.outline import is_outline, outlined
from posttrain.models.value import Critic, attach, value_model

INIT = {
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "max_length": 64,
    "tie_embeddings": True,
    "tokenizer": {"type": "characters", "alphabet": "0123456789+=;#"},
}


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A folder with an adapter on the tied embeddings of the tiny model, and on its attention."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    config = lora_config(Lora(type="lora", r=2, target_modules=["q_proj", "embed_tokens"]))
    config.base_model_name_or_path = str(tiny_model)
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    return folder


def tensors(model):
    return {
        name: (tensor.shape, tensor.dtype, tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def ties(model):
    seen = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(parameter), []).append(name)
    return sorted(seen.values())


@pytest.fixture(scope="module")
def shards(tiny_model, tmp_path_factory):
    """The tiny model in several files."""
    folder = tmp_path_factory.mktemp("shards")
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    model.save_pretrained(folder, max_shard_size="8KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("load", [load_policy, load_classifier])
@pytest.mark.parametrize("source", ["path", "shards", "init", "bfloat16", "adapter", "untied"])
def test_it_has_the_tensors_of_the_model(load, source, tiny_model, shards, adapter):
    config = {
        "path": {"path": str(tiny_model)},
        "shards": {"path": str(shards)},
        "init": {"init": INIT},
        "bfloat16": {"path": str(tiny_model), "dtype": "bfloat16"},
        "adapter": {"path": str(tiny_model), "adapter": {"path": str(adapter), "mode": "merge"}},
        "untied": {
            "path": str(tiny_model),
            "peft": {"type": "lora", "target_modules": ["embed_tokens"]},
        },
    }[source]
    whole, _ = load(ModelConfig(**config), seed=3)
    with outlined():
        outline, _ = load(ModelConfig(**config), seed=3)
    assert is_outline(outline) and not is_outline(whole)
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert tensors(outline) == tensors(whole) and ties(outline) == ties(whole)
    assert list(tensors(outline)) == list(tensors(whole)), "the main rank sends them in its order"
    assert type(outline) is type(whole) and outline.training == whole.training
    assert outline.config.to_dict() == whole.config.to_dict()
    assert getattr(outline, "hf_device_map", None) is None, "the Trainer would take it for a model in parts"
    if load is load_policy:
        assert outline.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("separate", [True, False])
def test_critic_and_adapter_are_outlines_too(separate, tiny_model):
    found = []
    for wanted in (False, True):
        with outlined(wanted):
            policy, _ = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
            critic = Critic(value_model(policy, pad_token_id=0), separate=separate)
            critic.add_adapter(lora_config(Lora(type="lora", r=2)))
            adapted = get_peft_model(policy, lora_config(Lora(type="lora", r=2)))
            attach(adapted.get_base_model(), critic)
        found.append(adapted)
    assert tensors(found[0]) == tensors(found[1]) and list(tensors(found[0])) == list(tensors(found[1]))
    assert is_outline(found[1]) and not is_outline(found[0])
