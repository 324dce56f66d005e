"""Adapters in a recipe: which folder is what, and options that cannot work are refused before weights are loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain.config.adapters import matches, module_names, resolved, trained_lora
from posttrain.config.locations import Locations
from posttrain.config.model_types import (
    FUSED_EXPERTS,
    NAMES_OF_EXPERTS,
    PAST_ADAPTERS,
    TOGETHER,
    without_adapter,
    without_adapter_note,
    wrong_adapter_for_type,
)
from posttrain.config.preflight import check_needs
from posttrain.config.schema import Lora, ModelConfig
from posttrain.errors import ModelError, NeedsError, RecipeError, RecipeErrors
from posttrain.methods import METHODS
from posttrain.models.adapters import for_model, lora_config


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


OF_A_TYPE = [
    ("mixtral", {"dropout": 0.1}, "have no dropout.*name layers of attention"),
    ("qwen3_moe", {"dora": True}, "have no dora"),
    ("qwen3_moe", {"target_modules": ["q_proj", "up_proj"]}, "gate_proj and up_proj of the experts are one tensor"),
    ("mamba2", {"target_modules": ["in_proj", "out_proj"]}, "read the weights of out_proj past an adapter"),
    ("qwen3_moe", {"target_modules": ["q_proj"], "dropout": 0.1, "dora": True}, None),
    ("mamba2", {}, None),
]


@pytest.mark.parametrize("kind, options, says", OF_A_TYPE)
def test_what_the_type_does_not_take_is_refused(load, tmp_path, kind, options, says):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text(json.dumps({"model_type": kind}))
    recipe = load({"name": "sft"}, {"model": {"path": str(tmp_path / "start"), "peft": LORA | options}})
    found = list(wrong_adapter_for_type(recipe, Locations("recipe")))
    assert len(found) == (says is not None)
    if says is not None:
        with pytest.raises(NeedsError, match=f"(?s){says}"):
            check_needs(recipe, METHODS["sft"](recipe.method).needs, "sft")


def test_the_tables_are_pefts():
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils import transformers_weight_conversion as peft

    assert {t for t, of in peft._MODEL_TO_CONVERSION_PATTERN.items() if of in peft._MOE_FUSED_TARGETS} == FUSED_EXPERTS
    assert set().union(*peft._MOE_TARGET_MODULE_MAPPING.values()) == set(NAMES_OF_EXPERTS)
    assert {tuple(n) for of in peft._MOE_FUSED_TARGETS.values() for n in of.values()} == set(TOGETHER)
    for kind, names in PAST_ADAPTERS.items():
        if "out_proj" in names:
            model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
            with pytest.raises(ValueError, match="incompatible"):
                _check_lora_target_modules_mamba(LoraConfig(), model, "out_proj")


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_layers_that_peft_leaves_beside_experts_are_named(small_causal, tmp_path):
    """Of each type: by the names in its files, as `check` has them, and by those in memory, as `train` has."""
    found = set()
    for kind in sorted(FUSED_EXPERTS & set(small_causal.TYPES) - set(small_causal.NOT_BUILT)):
        model = small_causal.build(kind)
        model.save_pretrained(tmp_path / kind)
        in_files = module_names(ModelConfig(path=str(tmp_path / kind)))
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        lora = Lora(type="lora")
        said = without_adapter_note(kind, lora, linears)
        assert without_adapter_note(kind, lora, in_files) == said
        get_peft_model(model, for_model(lora_config(lora), model))
        left = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear} & set(linears)
        left -= {"lm_head"} | {name for name in linears if name.rpartition(".")[2] in PAST_ADAPTERS.get(kind, ())}
        assert set(without_adapter(kind, lora, linears)) == left, kind
        assert (said is not None) == bool(left)
        found |= {kind} if left else set()
    assert len(found) == 14
    attention = Lora(type="lora", target_modules=["q_proj", "o_proj"])
    names = [
        "model.layers.3.mlp.shared_experts.up_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.3.mlp.experts.0.up_proj",
    ]
    assert without_adapter_note("deepseek_v3", attention, names) is None
    some = Lora(type="lora", modules_to_save=["mlp.shared_experts"])
    assert "no adapter on mlp in 1 layer, which" in without_adapter_note("deepseek_v3", some, names)
    assert "[layers.0.mlp]" in without_adapter_note("deepseek_v3", some, names)


def test_sections_that_contradict_each_other(load, tiny_model, tmp_path):
    folder = str(adapter_folder(tmp_path / "adapter", str(tiny_model)))
    with pytest.raises(RecipeError, match="leave out `peft`"):
        load({"name": "sft"}, {"model.peft": LORA, "model.adapter": {"path": folder, "mode": "continue"}})
    with pytest.raises(RecipeError, match="`init` makes one"):
        load({"name": "sft"}, {"model": {"init": {}, "adapter": {"path": folder}}})
    recipe = load({"name": "sft"}, {"model.peft": LORA, "model.adapter.path": folder, "model.quantization": {}})
    with pytest.raises(NeedsError, match="cannot be merged into a quantised base"):
        check_needs(recipe, METHODS["sft"](recipe.method).needs, "sft")
