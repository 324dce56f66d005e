"""What stands beside the weights: as the start has it, repaired where it cannot be written, proven before training."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.models.loading import load_policy
from posttrain.models.saving import SavePlan, valid_generation

REPAIRED = [
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
    ({"top_k": 20, "eos_token_id": [1, 2]}, {"do_sample": True, "top_k": 20, "eos_token_id": [1, 2]}),
    ({"length_penalty": 2.0}, {"length_penalty": None}),
    ({"early_stopping": True, "do_sample": False, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
    ({"output_scores": True}, {"output_scores": None}),
]


@pytest.mark.parametrize("given, wanted", REPAIRED, ids=[",".join(given) for given, _ in REPAIRED])
def test_a_generation_config_is_made_valid_with_a_word(tmp_path, given, wanted):
    config = GenerationConfig(**given)
    with pytest.raises(ValueError):
        config.save_pretrained(tmp_path)
    repaired, notes = valid_generation(config)
    repaired.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in wanted} == wanted
    assert notes and all("cannot be saved" in note for note in notes)
    assert config.to_dict() == GenerationConfig(**given).to_dict()  # what sampling reads is not touched


def test_a_valid_one_stays_as_it_is():
    given = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=[5, 7])
    repaired, notes = valid_generation(given)
    assert repaired.to_dict() == given.to_dict() and notes == []


@pytest.fixture
def loaded(tiny_model):
    config = ModelConfig(path=str(tiny_model))
    return config, *load_policy(config, seed=0)


def test_the_proof_passes_and_leaves_nothing(loaded, tiny_model):
    config, model, tokenizer = loaded
    plan = SavePlan.of(config, model, tokenizer)
    plan.prove(["1+2=3", "#4"])
    assert plan.notes == []
    SavePlan.of_path(config, tokenizer, classifier=False).prove(["1+2=3"])


def test_a_tokenizer_that_comes_back_as_another_is_refused(loaded):
    config, model, tokenizer = loaded
    plan = SavePlan.of(config, model, tokenizer)
    tokenizer.save_pretrained = lambda folder: load_policy(
        ModelConfig(init={"tokenizer": {"type": "characters", "alphabet": "0123456789+=;#x"}}), seed=0
    )[1].save_pretrained(folder)
    with pytest.raises(ModelError, match="number of tokens is another"):
        plan.prove()


def test_a_tokenizer_that_transformers_reads_by_a_class_of_its_own_is_refused():
    """Qwen's splits numbers into digits, whatever the saved one does."""
    init = {"architecture": "qwen2", "hidden_size": 16, "heads": 2, "tokenizer": {"type": "bpe", "vocab_size": 280}}
    texts = ["1 + 48 = 49", "48 and 48 again"] * 20
    config = ModelConfig(init=init)
    model, tokenizer = load_policy(config, seed=0, corpus=texts)
    with pytest.raises(ModelError, match="take llama"):
        SavePlan.of(config, model, tokenizer).prove(texts[:2])


def test_a_template_that_is_lost_is_refused(loaded):
    config, model, tokenizer = loaded
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    plan, save = SavePlan.of(config, model, tokenizer), tokenizer.save_pretrained

    def forgetful(folder):
        save(folder)
        (folder / "chat_template.jinja").unlink()

    tokenizer.save_pretrained = forgetful
    with pytest.raises(ModelError, match="chat template is another"):
        plan.prove()


def test_a_config_that_cannot_be_written_is_refused(loaded):
    config, model, tokenizer = loaded
    model.config.further = {1, 2}  # sets are no JSON
    with pytest.raises(ModelError, match="could not be saved"):
        SavePlan.of(config, model, tokenizer).prove()


@pytest.mark.parametrize(
    "start, trained, key, saved",
    [
        ("bfloat16", "float32", None, "bfloat16"),
        ("float16", "float32", None, "float16"),
        ("float32", "float32", None, "float32"),
        ("float32", "bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", "float32", "float32"),
        ("float32", "float32", "float16", "float16"),
    ],
)
def test_the_type_of_the_saved_weights(tiny_model, tmp_path, start, trained, key, saved):
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    model.to(getattr(torch, start)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = ModelConfig(path=str(tmp_path / "start"), dtype=trained, save_dtype=key)
    model, tokenizer = load_policy(config, seed=0)
    plan = SavePlan.of(config, model, tokenizer)
    state = {n: p.detach().to(plan.saved_type(n, p, model)) for n, p in model.named_parameters()}
    (tmp_path / "saved").mkdir()
    plan.write(tmp_path / "saved", model, state)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == saved
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert read.dtype == getattr(torch, saved)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(read.dtype)), name
    assert ("saved in" in " ".join(plan.notes)) == (key is None and saved != trained)


def test_what_an_architecture_keeps_in_float32_stays_so(loaded):
    config, model, tokenizer = loaded
    plan = SavePlan.of(config.model_copy(update={"save_dtype": "bfloat16"}), model, tokenizer)
    model._keep_in_fp32_modules = ["norm"]
    weight, counts = torch.ones(2), torch.ones(2, dtype=torch.long)
    assert plan.saved_type("model.norm.weight", weight, model) == torch.float32
    assert plan.saved_type("model.embed_tokens.weight", weight, model) == torch.bfloat16
    assert plan.saved_type("model.norm.counts", counts, model) == torch.long
