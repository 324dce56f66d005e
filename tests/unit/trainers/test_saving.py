"""The saved model is the trained one, with the start's settings; a run is never lost to its last minute."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.models.saving import SavePlan
from posttrain.trainers.run import build, train


@pytest.fixture(scope="module")
def foreign(tiny_model, tmp_path_factory):
    """A 16-bit start whose generation config cannot be saved, as some public ones are."""
    folder = tmp_path_factory.mktemp("foreign")
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    tokenizer.padding_side = "right"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("method", ["sft", "ppo", "reward"])
def test_a_foreign_start_is_saved_as_it_was(load, foreign, method):
    changes = {"model.path": str(foreign), "training.max_steps": 2, "training.gradient_checkpointing": True}
    changes["training.save_steps"] = 1
    result = train(load({"name": method}, changes))
    for folder in [result.model_dir, *([result.run_dir / "critic"] if method == "ppo" else [])]:
        config = json.loads((folder / "config.json").read_text())
        before = json.loads((foreign / "config.json").read_text())
        kept = ("dtype", "use_cache", "eos_token_id", "bos_token_id", "tie_word_embeddings", "max_position_embeddings")
        assert {key: config.get(key) for key in kept} == {key: before.get(key) for key in kept}
        tensors = load_file(folder / "model.safetensors")
        assert {t.dtype for n, t in tensors.items() if n != "score.weight"} == {torch.bfloat16}
        assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "right"
    if method != "reward":
        generation = GenerationConfig.from_pretrained(result.model_dir)
        assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.9, 0.6)
        size = (result.model_dir / "model.safetensors").stat().st_size
        assert size < 1.1 * (foreign / "model.safetensors").stat().st_size


def test_a_saved_model_that_is_another_is_set_aside_and_the_run_kept(load, monkeypatch):
    write = SavePlan.write

    def zeroing(self, folder, policy, state, **further):
        state = {n: torch.zeros_like(t) if n.endswith("down_proj.weight") else t for n, t in state.items()}
        write(self, folder, policy, state, **further)

    recipe = load({"name": "ppo"}, {"training.max_steps": 2})
    monkeypatch.setattr(SavePlan, "write", zeroing)
    with pytest.raises(ModelError, match="not the one that was trained: .*down_proj.weight is loaded with other"):
        train(recipe)
    run_dir = Path(recipe.output)
    assert (run_dir / "model-rejected").is_dir() and not (run_dir / "model").exists()
    monkeypatch.undo()
    result = train(recipe, resume="auto")  # from the checkpoint of the last step
    assert result.steps == 2 and (result.model_dir / "model.safetensors").is_file()
    assert (result.run_dir / "critic" / "model.safetensors").is_file()


def test_a_policy_that_no_tensor_shows_is_found_by_its_log_probs(load, monkeypatch):
    """As where weights are gathered or merged wrongly: the files hold just what was gathered."""
    from posttrain.rollouts.weight_sync import PolicyWeights

    right = PolicyWeights.named_tensors

    def without_adapter(self, *, merged=True):
        yield from right(self, merged=False)

    recipe = load({"name": "sft"}, {"training.max_steps": 3, "model.peft": {"type": "lora", "r": 4}})
    monkeypatch.setattr(PolicyWeights, "named_tensors", without_adapter)
    with pytest.raises(ModelError, match="log-probs differ from those of the trained policy by up to"):
        train(recipe)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "reward", "dapo_step"])
def test_dropout_of_an_adapter_acts_in_every_shell(load, method):
    changes = {"model.peft": {"type": "lora", "r": 2, "dropout": 0.5}}
    section = {"name": method} | ({"delimiter": ";"} if method == "dapo_step" else {})
    recipe = load(section, changes)
    built = build(recipe, METHODS[method](recipe.method), PartialState(cpu=True))
    shell = built.shell
    try:
        with torch.no_grad():
            for name, parameter in shell.model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
        shell.model.train()
        inputs = shell.step_batches(0)[0]
        counts = shell.global_counts([inputs], torch.device("cpu"))
        shell.step_losses = []
        adapted = next(p for n, p in shell.model.named_parameters() if ".lora_A." in n and p.requires_grad)

        def gradients():
            for _ in range(3):
                loss = shell.compute_loss(shell.model, inputs, num_items_in_batch=counts)
                yield float(torch.autograd.grad(loss, adapted)[0].double().norm())

        assert len(set(gradients())) == 3
        shell.model.eval()
        assert len(set(gradients())) == 1
    finally:
        shell.parts.engine.close()
        if shell.parts.judge is not None:
            shell.parts.judge.close()


def test_old_log_probs_and_values_know_no_dropout(load):
    changes = {"model.peft": {"type": "lora", "r": 2, "dropout": 0.5}}
    recipe = load({"name": "ppo", "epochs": 2}, changes)
    shell = build(recipe, METHODS["ppo"](recipe.method), PartialState(cpu=True)).shell
    try:
        with torch.no_grad():
            for name, parameter in shell.model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
        shell.model.train()
        batches = shell.step_batches(0)
        names = ("old_logps", "ref_logps", "old_values")
        first = [{name: batch[name].clone() for name in names if name in batch} for batch in batches]
        shell._frozen_logps(batches)
        assert shell.model.training and {"old_logps", "old_values"} <= set(first[0])
        for before, after in zip(first, batches, strict=True):
            for name, values in before.items():
                assert torch.equal(values, after[name]), name
    finally:
        shell.parts.engine.close()
        shell.parts.judge.close()


def test_a_merged_adapter_loads_as_the_policy_that_was_trained(load, foreign):
    changes = {"model.path": str(foreign), "training.max_steps": 2, "model.peft": {"type": "lora", "r": 4}}
    result = train(load({"name": "dpo"}, changes))
    merged = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert merged.dtype == torch.bfloat16 and merged.config.use_cache is True
    start = AutoModelForCausalLM.from_pretrained(foreign)
    moved = [n for n, p in merged.named_parameters() if not torch.equal(p, start.get_parameter(n))]
    assert moved and all("_proj" in name for name in moved)
