"""Adapters in a recipe: which folder is what, and options that cannot work are refused before weights are loaded."""

import json
import shutil

import pytest

from posttrain.config.adapters import matches, module_names, resolved, trained_lora
from posttrain.config.preflight import check_needs
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError, NeedsError, RecipeError, RecipeErrors
from posttrain.methods import METHODS


def adapter_folder(folder, base, **changes):
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 3, "target_modules": ["q_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_an_adapter_folder_stands_for_its_base_and_itself(tiny_model, tmp_path):
    folder = adapter_folder(tmp_path / "adapter", str(tiny_model))
    found = resolved(ModelConfig(path=str(folder)))
    assert (found.path, found.adapter.path, found.adapter.mode) == (str(tiny_model), str(folder), "merge")
    assert resolved(found) == found and not found.adapted
    found = ModelConfig(path=str(folder), adapter={"mode": "continue"})
    assert found.adapted and resolved(found).adapter.mode == "continue"
    assert trained_lora(found).r == 3
    plain = ModelConfig(path=str(tiny_model))
    assert resolved(plain) is plain


def test_folders_that_are_not_what_they_are_taken_for(tiny_model, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(tiny_model, both)
    mine = adapter_folder(tmp_path / "adapter", "")
    for file in mine.iterdir():
        shutil.copy(file, both)
    other = adapter_folder(tmp_path / "ia3", str(tiny_model), peft_type="IA3")
    pickled = adapter_folder(tmp_path / "pickled", str(tiny_model))
    (pickled / "adapter_model.safetensors").unlink()
    cases = {
        "holds a whole model and an adapter": {"path": str(both)},
        "does not say which model": {"path": str(mine)},
        "is an adapter and no whole model": {"path": str(mine), "adapter": {"path": str(mine)}},
        "only LoRA can be started from": {"path": str(other)},
        "pickled weights are not loaded": {"path": str(pickled)},
        "is no adapter folder": {"path": str(tiny_model), "adapter": {}},
        "holds no adapter|is no adapter folder": {"path": str(tiny_model), "adapter": {"path": str(tmp_path / "no")}},
    }
    for says, section in cases.items():
        with pytest.raises(ModelError, match=says):
            resolved(ModelConfig(**section))


@pytest.mark.parametrize(
    "targets, name, found",
    [
        (["q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["proj"], "model.layers.0.self_attn.q_proj", False),
        (["self_attn.q_proj"], "model.layers.0.self_attn.q_proj", True),
        (r".*\.[qk]_proj", "model.layers.0.self_attn.k_proj", True),
        (r"[qk]_proj", "model.layers.0.self_attn.k_proj", False),
    ],
)
def test_targets_match_as_in_peft(targets, name, found):
    assert matches(targets, name) is found


def test_module_names_without_loading(tiny_model):
    names = module_names(ModelConfig(path=str(tiny_model)))
    assert "model.layers.1.mlp.down_proj" in names and "model.embed_tokens" in names
    assert set(names) - set(module_names(ModelConfig(init={"layers": 2}))) == {
        f"model.layers.{n}.{norm}_layernorm" for n in (0, 1) for norm in ("input", "post_attention")
    }
    assert module_names(ModelConfig(path="owner/on-the-hub")) is None


LORA = {"type": "lora"}
REFUSED = [
    ("sft", {"model.peft": {**LORA, "target_modules": ["q_pro"]}}, "no module of the model is called 'q_pro'.*q_proj"),
    ("dpo", {"model.peft": {**LORA, "target_modules": ["q_proj", "lm_head"]}}, "an adapter on lm_head"),
    ("sft", {"model.peft": {**LORA, "modules_to_save": ["embed"]}}, "no module of the model is called 'embed'"),
    ("sft", {"model.peft": {**LORA, "rank_pattern": {"z_proj": 4}}}, "no module of the model is called 'z_proj'"),
    ("sft", {"model.peft": {**LORA, "alpha_pattern": {"z_proj": 4}}}, "no module of the model is called 'z_proj'"),
    ("sft", {"model.peft": {**LORA, "target_modules": ["q_proj"], "layers_to_transform": [2]}}, "there is no layer 2"),
    ("sft", {"model.peft": {**LORA, "layers_to_transform": [0]}}, "needs names of modules"),
    ("sft", {"model.peft": {**LORA, "r": 3, "init_lora_weights": "orthogonal"}}, "needs even ranks, not 3"),
    ("dpo", {"model.peft": {**LORA, "bias": "all"}}, "would not be the start any more"),
    ("ppo", {"model.peft": {**LORA, "dora": True}}, "the critic's adapter does not have dora"),
    ("sft", {"model.quantization": {"bits": 4}}, "weights of a quantised base cannot be trained"),
    ("grpo", {"model.quantization": {"bits": 8}}, "weights of a quantised base cannot be trained"),
    ("ppo", {"model.peft": LORA, "model.quantization": {}}, "starts from whole weights"),
    ("sft", {"model.peft": LORA, "model.quantization": {"bits": 8, "type": "fp4"}}, "8 bits have no such choice"),
]


@pytest.mark.parametrize("method, changes, says", REFUSED)
def test_what_cannot_work_is_refused(load, method, changes, says):
    with pytest.raises((NeedsError, RecipeErrors), match=f"(?s){says}"):
        recipe = load({"name": method}, changes)
        check_needs(recipe, METHODS[method](recipe.method).needs, method)


def test_sections_that_contradict_each_other(load, tiny_model, tmp_path):
    folder = str(adapter_folder(tmp_path / "adapter", str(tiny_model)))
    with pytest.raises(RecipeError, match="leave out `peft`"):
        load({"name": "sft"}, {"model.peft": LORA, "model.adapter": {"path": folder, "mode": "continue"}})
    with pytest.raises(RecipeError, match="`init` makes one"):
        load({"name": "sft"}, {"model": {"init": {}, "adapter": {"path": folder}}})
    recipe = load({"name": "sft"}, {"model.peft": LORA, "model.adapter.path": folder, "model.quantization": {}})
    with pytest.raises(NeedsError, match="cannot be merged into a quantised base"):
        check_needs(recipe, METHODS["sft"](recipe.method).needs, "sft")
