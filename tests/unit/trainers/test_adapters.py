"""Runs that start from adapters, train them with PEFT's options, or on a base in few bits."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli.check import check_recipe
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.models.loading import load_policy
from posttrain.trainers.run import train

IDS = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 2]])


def logps(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float().log_softmax(-1)


def losses(result):
    return [json.loads(line)["loss"] for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory, make_recipe_data):
    """An adapter that has been trained, and the run that did."""
    from posttrain.config.loading import load_recipe
    from posttrain.methods import METHODS

    folder = tmp_path_factory.mktemp("adapter")
    changes = {"model.peft": {"type": "lora", "r": 4}, "training.max_steps": 4, "training.learning_rate": 0.02}
    (folder / "recipe.yaml").write_text(json.dumps(make_recipe_data(tiny_model, folder, {"name": "sft"}, changes)))
    return train(load_recipe(folder / "recipe.yaml", [], {n: m.Config for n, m in METHODS.items()})).run_dir


def test_an_adapter_folder_loads_as_its_merged_model(adapter, tiny_model):
    merged, _ = load_policy(ModelConfig(path=str(adapter / "adapter")), seed=0)
    explicit, _ = load_policy(ModelConfig(path=str(tiny_model), adapter={"path": str(adapter / "adapter")}), seed=0)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter / "adapter")
    saved = AutoModelForCausalLM.from_pretrained(adapter / "model")
    for other in (explicit, by_peft, saved):
        torch.testing.assert_close(logps(merged), logps(other), atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert (logps(merged) - logps(AutoModelForCausalLM.from_pretrained(tiny_model))).abs().max() > 0.05


@pytest.mark.parametrize("mode", ["merge", "continue"])
def test_dpo_compares_with_the_policy_it_starts_from(load, adapter, mode):
    """With the base model as the reference the first loss would not be log 2."""
    changes = {"model": {"path": str(adapter / "adapter"), "adapter": {"mode": mode}}}
    result = train(load({"name": "dpo"}, changes))
    assert losses(result)[0] == pytest.approx(math.log(2), abs=1e-5) and losses(result)[-1] < 0.69
    assert (result.run_dir / "adapter").is_dir() == (mode == "continue")
    start, _ = load_policy(ModelConfig(path=str(adapter / "adapter")), seed=0)
    assert (logps(AutoModelForCausalLM.from_pretrained(result.model_dir)) - logps(start)).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_an_adapter_is_trained_on_with_rollouts(load, adapter, method):
    section = {"name": method} | ({"beta": 0.1} if method == "grpo" else {})
    changes = {"model": {"path": str(adapter / "adapter"), "adapter": {"mode": "continue"}}, "training.max_steps": 1}
    result = train(load(section, changes))
    line = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert line["engine_logp_diff_max"] < 1e-4  # the engine samples with the adapter
    assert abs(line.get("kl", line.get("kl_reward", 1.0))) < 1e-6  # and the reference has it too


def test_an_adapter_of_another_model_is_refused(load, adapter, tmp_path):
    init = {
        "hidden_size": 24,
        "layers": 2,
        "heads": 2,
        "tokenizer": {"type": "characters", "alphabet": "0123456789+=;#"},
    }
    for part in load_policy(ModelConfig(init=init), seed=0):
        part.save_pretrained(tmp_path / "other")
    section = {"path": str(tmp_path / "other"), "adapter": {"path": str(adapter / "adapter")}}
    for mode in ("merge", "continue"):
        section["adapter"]["mode"] = mode
        with pytest.raises(ModelError, match="does not fit the model"):
            train(load({"name": "sft"}, {"model": section}))


def test_layers_beside_experts_stay_as_they_are_unless_they_are_trained_whole(
    load, write_recipe, tiny_model, small_causal, tmp_path, capsys
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for part in (tokenizer, small_causal.build("deepseek_v3", vocab_size=len(tokenizer))):
        part.save_pretrained(tmp_path / "start")
    whole = ["layers.0.mlp", "mlp.shared_experts"]
    said = "no adapter on mlp in 1 layer and mlp.shared_experts in 1 layer"
    before, moved = load_file(tmp_path / "start" / "model.safetensors"), {}
    for saved in (None, whole):
        peft = {"type": "lora", "r": 4, "modules_to_save": saved}
        changes = {"model": {"path": str(tmp_path / "start"), "peft": peft}, "training.max_steps": 2}
        changes["output"] = str(tmp_path / f"run-{saved is None}")
        check_recipe(write_recipe({"name": "sft"}, changes), [], online=False, world_size=1)
        assert (said in capsys.readouterr().out) == (saved is None)
        after = load_file(train(load({"name": "sft"}, changes)).model_dir / "model.safetensors")
        assert (said in capsys.readouterr().out) == (saved is None)
        moved[saved is None] = {name for name in before if not torch.equal(before[name], after[name])}
    beside = {name for name in before if ".shared_experts." in name or ".0.mlp." in name}
    assert beside and not beside & moved[True] and beside <= moved[False]
    assert any(".experts." in name for name in moved[True])


OPTIONS = {
    "dora": {"dora": True},
    "patterns": {
        "rslora": True,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"o_proj": 5},
        "layers_to_transform": [1],
        "init_lora_weights": "orthogonal",
    },
    "bias": {"bias": "lora_only"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_lora_is_merged_as_it_was_trained(load, tiny_model, name):
    """The run itself compares `model/` with the trained policy; here with what PEFT makes of `adapter/`."""
    peft = {"type": "lora", "r": 4, **OPTIONS[name]}
    result = train(load({"name": "sft"}, {"model.peft": peft, "training.max_steps": 2}))
    saved = AutoModelForCausalLM.from_pretrained(result.model_dir)
    tied = name not in ("embeddings", "head")
    assert saved.config.tie_word_embeddings is tied
    base = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=tied)
    if not tied:
        base.lm_head.weight.data = base.model.embed_tokens.weight.data.clone()
    by_peft = PeftModel.from_pretrained(base, result.run_dir / "adapter")
    torch.testing.assert_close(logps(saved), logps(by_peft), atol=1e-4, rtol=0)
    moved = {n for n, p in saved.named_parameters() if not torch.equal(p, base_weight(tiny_model, n))}
    assert moved
    if name == "patterns":
        assert {n.split(".")[2] for n in moved} == {"1"} and {n.split(".")[-2] for n in moved} == {"q_proj", "o_proj"}


def base_weight(folder, name):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_parameter(name if name in dict(model.named_parameters()) else "model.embed_tokens.weight")


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_is_trained_through_an_adapter(load, wide_model, method, bits):
    pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    section = {"name": method} | ({"beta": 0.1} if method == "grpo" else {})
    model = {"path": str(wide_model), "peft": {"type": "lora", "r": 4}, "quantization": {"bits": bits}}
    result = train(load(section, {"model": model, "training.max_steps": 2}))
    saved = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert not hasattr(saved.config, "quantization_config") and saved.dtype == torch.float32
    start = AutoModelForCausalLM.from_pretrained(wide_model)
    assert 0 < (logps(saved) - logps(start)).abs().max() < 3  # rounded to few bits, and trained
    config = json.loads((result.run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(wide_model)
    if method == "dpo":
        # 8 bits are for the inputs of a layer too, by what stands in the same batch
        assert losses(result)[0] == pytest.approx(math.log(2), abs=1e-5 if bits == 4 else 1e-3)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Blocks of 64 numbers share a scale, so that narrower weights are padded."""
    folder = tmp_path_factory.mktemp("wide")
    init = {"hidden_size": 64, "layers": 2, "heads": 2, "max_length": 96}
    init["tokenizer"] = {"type": "characters", "alphabet": "0123456789+=;#"}
    for part in load_policy(ModelConfig(init=init), seed=0):
        part.save_pretrained(folder)
    return folder
