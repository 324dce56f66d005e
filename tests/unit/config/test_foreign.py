"""Configurations of other tools as recipes, and their keys in ours."""

from __future__ import annotations

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.foreign import KEYS, ROWS, convert
from posttrain.config.known import walk
from posttrain.config.loading import build_recipe, load_recipe
from posttrain.config.locations import Locations
from posttrain.config.schema import Recipe
from posttrain.errors import RecipeError
from posttrain.methods import CONFIGS

TRL_GRPO = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dtype: bfloat16
dataset_name: openai/gsm8k
dataset_config: main
learning_rate: 1e-6
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
num_generations: 16
max_completion_length: 512
beta: 0.04
loss_type: dapo
use_vllm: true
vllm_mode: colocate
max_steps: 100
reward_funcs: [accuracy_reward]
output_dir: out
"""

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
warmup_steps: 10
flash_attention: true
special_tokens:
  pad_token: "<pad>"
output_dir: ./outputs
"""

TRL_PPO = """
stage: ppo
model_name_or_path: EleutherAI/pythia-1b-deduped
sft_model_path: EleutherAI/pythia-1b-deduped
reward_model_path: trl-lib/pythia-1b-reward
dataset_name: trl-lib/tldr
num_ppo_epochs: 2
num_mini_batches: 4
cliprange: 0.1
vf_coef: 0.2
lam: 0.9
kl_coef: 0.03
missing_eos_penalty: 1.0
response_length: 53
learning_rate: 3e-6
per_device_train_batch_size: 64
max_steps: 10
output_dir: ppo
"""

FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
output_dir: saves/dpo
"""


def made(text, **keys):
    found = convert(yaml.safe_load(text), **keys)
    return found, {key for key, _, _ in found.left}


def test_trl() -> None:
    found, left = made(TRL_GRPO, ranks=2)
    assert left == {"reward_funcs"}
    found.recipe["verifier"] = [{"type": "math"}]
    recipe = build_recipe(found.recipe, Locations("trl"), CONFIGS)
    assert (recipe.method.name, recipe.method.beta, recipe.method.aggregation) == ("grpo", 0.04, "tokens")
    # 8 completions x 4 accumulated x 2 ranks, in groups of 16
    assert (recipe.batch.prompts_per_step, recipe.batch.micro_batch, recipe.training.max_steps) == (4, 8, 100)
    assert (recipe.rollouts.samples_per_prompt, recipe.rollouts.max_new_tokens, recipe.rollouts.engine) == (
        16,
        512,
        "vllm",
    )
    assert (recipe.data.prompts.path, recipe.data.prompts.name) == ("openai/gsm8k", "main")


def test_ppo() -> None:
    found, left = made(TRL_PPO)
    assert left == {"reward_model_path", "missing_eos_penalty"}
    found.recipe["verifier"] = [{"type": "reward_model", "path": "trl-lib/pythia-1b-reward"}]
    recipe = build_recipe(found.recipe, Locations("trl"), CONFIGS)
    said = recipe.method.model_dump(include={"epochs", "minibatches", "epsilon", "vf_coef", "lam", "kl_coef"})
    assert said == {"epochs": 2, "minibatches": 4, "epsilon": 0.1, "vf_coef": 0.2, "lam": 0.9, "kl_coef": 0.03}
    assert recipe.rollouts.max_new_tokens == 53


@pytest.mark.parametrize(
    ("key", "said"), [("num_ppo_epochs", "it is `method.epochs` here"), ("cliprange", "it is `method.epsilon` here")]
)
def test_keys_of_ppo_elsewhere_hint_at_ours(key, said) -> None:
    data = {"method": {"name": "ppo", key: 1}, "output": "x"}
    with pytest.raises(RecipeError, match=said):
        build_recipe(data, Locations("here"), CONFIGS)


def test_axolotl() -> None:
    found, left = made(AXOLOTL)
    assert left == {"datasets[0].type", "sample_packing", "flash_attention", "special_tokens"}
    recipe = build_recipe(found.recipe, Locations("axolotl"), CONFIGS)
    assert (recipe.method.name, recipe.data.completions.path, recipe.data.max_length) == (
        "sft",
        "tatsu-lab/alpaca",
        2048,
    )
    assert (recipe.batch.rows_per_step, recipe.batch.micro_batch) == (16, 2)
    lora = recipe.model.peft
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (32, 16, 0.05, "all-linear")
    assert recipe.model.quantization.bits == 4 and recipe.training.gradient_checkpointing
    assert (recipe.training.lr_scheduler_type, recipe.training.warmup_steps) == ("cosine", 10)


def test_llama_factory() -> None:
    found, left = made(FACTORY)
    assert left == {"dataset", "template", "warmup_ratio"}
    found.recipe["data"]["preferences"]["path"] = "pairs.jsonl"
    recipe = build_recipe(found.recipe, Locations("factory"), CONFIGS)
    assert (recipe.method.name, recipe.method.beta, recipe.batch.rows_per_step) == ("dpo", 0.1, 8)
    assert (recipe.model.peft.r, recipe.model.peft.target_modules, recipe.training.bf16) == (8, "all-linear", True)
    assert recipe.training.num_train_epochs == 3.0 and recipe.output == "saves/dpo"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1.0", "names no model"),
        ("{model_name_or_path: m, stage: kto}", "no counterpart of 'kto'"),
        ("{model_name_or_path: m, stage: dpo, pref_loss: orpo}", "no loss 'orpo'"),
        ("{base_model: m, rl: orpo}", "no counterpart of 'orpo'"),
    ],
)
def test_what_has_no_counterpart_is_refused(text, said) -> None:
    with pytest.raises(RecipeError, match=said):
        made(text)


def test_every_key_of_ours_in_the_table_exists() -> None:
    sections = {(place, name) for place, model in walk(Recipe) for name in model.model_fields}
    parameters = {name for config in CONFIGS.values() for name in config.model_fields}
    for theirs, ours in KEYS.items():
        *path, last = ours.key.replace(ROWS, "data.prompts").split(".")
        known = not ours.key or (last in parameters if path == ["method"] else (tuple(path), last) in sections)
        assert known, (theirs, ours.key)
        assert ours.key or ours.note, theirs


def test_the_command(tmp_path) -> None:
    (tmp_path / "theirs.yaml").write_text(FACTORY)
    arguments = ["convert", str(tmp_path / "theirs.yaml"), "--out", str(tmp_path / "recipe.yaml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert "not carried over: dataset: 'dpo_en_demo': a name in dataset_info.json" in result.output
    assert "batch size -> batch.rows_per_step: 1 x 8 x 1 rank" in result.output
    ours = load_recipe(tmp_path / "recipe.yaml", ["data.preferences.path=pairs.jsonl"], CONFIGS)
    assert ours.method.name == "dpo"
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and "is there already" in str(again.exception)
    unknown = CliRunner().invoke(app, [*arguments, "--method", "dppo"])
    assert unknown.exit_code == 1


def test_their_keys_in_a_recipe_are_told_ours(tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: m}\ndata: {completions: {path: x.jsonl}}\nmethod: {name: sft}\n"
        "batch: {per_device_train_batch_size: 4, rows_per_step: 8}\ntraining: {max_steps: 1, warmup_ratio: 0.1}\n"
        "output: o\ngradient_accumulation_steps: 2\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [], CONFIGS)
    said = str(caught.value)
    assert "it is `batch.micro_batch` here" in said and "give training.warmup_steps" in said
    assert "it is `batch.rows_per_step` here; counted over all ranks" in said
