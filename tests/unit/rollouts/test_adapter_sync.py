"""The adapter as PEFT's files hold it, and what vLLM is told about it."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.errors import NeedsError
from posttrain.rollouts.adapter_sync import AdapterWeights
from posttrain.rollouts.weight_sync import PolicyWeights

SEQUENCES = [[1, 5, 6, 7, 2], [1, 9, 2]]


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)


def adapter(targets="all-linear", r=2):
    policy = get_peft_model(base(), LoraConfig(r=r, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    AcceleratorState._reset_state()
    return AdapterWeights(PolicyWeights(policy, Accelerator(cpu=True)))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_the_files_make_the_same_policy_over_the_same_base(targets, tmp_path):
    ours = adapter(targets)
    ours.save(ours.tensors(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    theirs = PolicyWeights(PeftModel.from_pretrained(base(), str(tmp_path)), ours.weights.accelerator)
    plain = PolicyWeights(base(), ours.weights.accelerator).logps(SEQUENCES)
    assert ours.weights.logps(SEQUENCES) == theirs.logps(SEQUENCES) != plain


def test_what_was_written_stays_when_training_goes_on():
    ours = adapter()
    before = ours.tensors()
    copies = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        for parameter in ours.weights.policy.parameters():
            parameter += 1.0
    assert all(torch.equal(before[name], copies[name]) for name in copies)


@pytest.mark.parametrize(("r", "room"), [(1, 1), (2, 8), (8, 8), (16, 16), (65, 128)])
def test_vllm_makes_room_for_the_rank_and_the_layers(r, room):
    found = adapter(["v_proj", "q_proj"], r)
    assert found.settings == {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": room,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    assert found.options == f"--enable-lora --max-lora-rank {room} --lora-target-modules q_proj v_proj"


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_an_adapter_on_an_end_of_the_model_is_refused(end):
    with pytest.raises(NeedsError, match=f"an adapter on .*{end}.weight is not sent by itself") as raised:
        adapter(["q_proj", end])
    assert raised.value.where == "model.peft.target_modules" and "sync: merged" in raised.value.hint


def test_a_rank_beyond_those_of_vllm_is_refused():
    with pytest.raises(NeedsError, match="up to rank 512, not 513") as raised:
        adapter(r=513)
    assert raised.value.where == "model.peft.r"
