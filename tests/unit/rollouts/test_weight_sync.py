"""Weights as a checkpoint would hold them, and the canary, against plain models."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.config.schema import Lora
from posttrain.errors import EngineError, NeedsError
from posttrain.models.adapters import for_model, lora_config
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit

SEQUENCES = [[1, 5, 6, 7, 2], [1, 9, 2]]


def model(*, tied: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def adapted(plain, targets):
    wrapped = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return wrapped


def weights(policy):
    AcceleratorState._reset_state()  # one per process: a bf16 run of another test would decide for this one
    return PolicyWeights(policy, Accelerator(cpu=True))


def test_without_merging_the_weights_are_those_under_the_adapter():
    read = dict(weights(adapted(model(), "all-linear")).named_tensors(merged=False))
    assert all(torch.equal(read[name], parameter) for name, parameter in model().named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "embed_tokens"]])
def test_a_plain_model_with_these_weights_has_the_same_log_probs(tied, targets):
    if tied and targets is not None and "embed_tokens" in targets:
        pytest.skip("refused, see below")
    policy = model(tied=tied) if targets is None else adapted(model(tied=tied), targets)
    read = dict(weights(policy).named_tensors())
    other = model(tied=tied)
    missing = other.load_state_dict(read, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    other.tie_weights()
    for ours, theirs in zip(weights(policy).logps(SEQUENCES), weights(other).logps(SEQUENCES), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert torch.equal(read["model.norm.weight"], other.model.norm.weight)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "llama4_text", "phimoe", "jamba", "mamba", "falcon_h1"])
def test_adapters_on_all_layers_of_other_types_are_trained_and_merged(small_causal, model_type):
    """Experts that are one tensor, routers that return more than scores, layers that are read past an adapter."""
    plain = small_causal.build(model_type)
    wrapped = get_peft_model(small_causal.build(model_type), for_model(lora_config(Lora(r=2)), plain)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    wrapped(input_ids=ids, use_cache=False).logits.square().sum().backward()
    ups = {name: p.grad for name, p in wrapped.named_parameters() if ".lora_B." in name}
    assert ups and all(grad is not None for grad in ups.values())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
        assert not plain.load_state_dict(dict(weights(wrapped).named_tensors()), strict=False).unexpected_keys
        found, expected = (each(input_ids=ids, use_cache=False).logits for each in (wrapped, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    "model_type", ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2", "minimax_m2"]
)
def test_engines_get_what_a_checkpoint_holds(small_causal, model_type, loaded, tmp_path):
    """Experts and a router's biases too, whether the model was read from files or made."""
    policy = small_causal.build(model_type)
    policy.save_pretrained(tmp_path)
    if loaded:
        policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    read, written = dict(weights(policy).tensors_of_files()), load_file(tmp_path / "model.safetensors")
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) and read[name].is_contiguous() for name in read)


def test_reading_merged_weights_leaves_the_model_as_it_is():
    policy = adapted(model(), "all-linear")
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    list(weights(policy).named_tensors())
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_what_is_read_is_a_copy():
    policy = model()
    read = dict(weights(policy).named_tensors())
    with torch.no_grad():
        policy.model.norm.weight.fill_(7)
    assert not torch.equal(read["model.norm.weight"], policy.model.norm.weight)


def test_an_adapter_on_tied_embeddings_is_refused_by_name():
    with pytest.raises(NeedsError, match=r"model\.embed_tokens.*tied") as raised:
        weights(adapted(model(tied=True), ["q_proj", "embed_tokens"])).refuse_tied_adapters()
    assert raised.value.where == "model.peft.target_modules"


@pytest.mark.parametrize(("tied", "targets"), [(True, "all-linear"), (False, ["embed_tokens"]), (True, None)])
def test_adapters_that_can_be_merged_are_not_refused(tied, targets):
    weights(model(tied=tied) if targets is None else adapted(model(tied=tied), targets)).refuse_tied_adapters()


def test_the_mode_of_the_model_is_kept():
    policy = model().train()
    weights(policy).logps(SEQUENCES)
    assert policy.training


def test_the_canary_accepts_up_to_its_limit_and_names_what_is_beyond():
    canary = Canary([[5, 6], [7], [8, 9, 10]], stop_id=2, limit=0.1)
    assert canary.sequences == [[5, 6, 2], [7, 2], [8, 9, 10, 2]]
    found = canary.check([[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.0625]], version=4)
    assert (found.mean, found.max) == (0.0625 / 3, 0.0625)
    with pytest.raises(EngineError, match=r"weight sync 4: .* up to 0\.2 nats on 3 canary tokens"):
        canary.check([[-1.0, -2.0], [-3.0]], [[-1.0, -2.0], [-3.2]], version=4)
    with pytest.raises(EngineError, match="inf nats"):
        canary.check([[-1.0]], [[float("nan")]], version=5)


def test_a_canary_uses_few_prompts_and_their_ends():
    canary = Canary([list(range(100))] * 9, stop_id=2, limit=1.0)
    assert len(canary.sequences) == 4
    assert canary.sequences[0] == [*range(37, 100), 2]


@pytest.mark.parametrize(
    ("given", "trainer_float32", "engine_dtype", "limit"),
    [
        (None, True, "float32", 1e-4),
        (None, True, "bfloat16", 0.5),
        (None, False, "float32", 0.5),
        (0.01, True, "f", 0.01),
    ],
)
def test_the_default_limit_follows_the_types(given, trainer_float32, engine_dtype, limit):
    assert canary_limit(given, trainer_float32=trainer_float32, engine_dtype=engine_dtype) == limit


def test_only_a_float32_model_without_autocast_computes_in_float32():
    assert weights(model()).computes_in_float32
    assert not weights(model(dtype=torch.bfloat16)).computes_in_float32
