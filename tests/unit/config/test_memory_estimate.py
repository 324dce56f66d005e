from __future__ import annotations

import pytest

from posttrain.config.memory import estimate_memory, gibibytes
from posttrain.config.needs import Needs

SAMPLES = Needs(data=("prompts",), rollouts=True, verifier=True, reference=True)
ROWS = Needs(data=("completions",))
PARAMETERS = 494_032_768


def terms(estimate) -> dict[str, int]:
    return {name: size for name, size, _ in (*estimate.fixed, *estimate.training, *estimate.sampling)}


def test_fixed_terms_of_full_training(load, supervised: str) -> None:
    recipe, _ = load(supervised)
    found = terms(estimate_memory(recipe, ROWS, sequence_tokens=512, sequences_per_rank=16))
    assert found["weights"] == found["gradients"] == 4 * PARAMETERS
    assert found["optimizer"] == 8 * PARAMETERS
    assert "reference" not in found and "KV cache" not in found and "autocast copies" not in found


def test_a_colocated_engine_holds_a_copy_of_its_type(load, online: str) -> None:
    def share(*changes: str) -> float | None:
        """Of the float32 weights."""
        recipe, _ = load(online, *changes)
        found = terms(estimate_memory(recipe, SAMPLES, sequence_tokens=512, sequences_per_rank=16))
        return found["engine"] / found["weights"] if "engine" in found else None

    assert share() is None
    assert share("rollouts.engine=vllm") == 1
    assert share("rollouts.engine=vllm", "training.bf16=true") == 0.5
    assert share("rollouts.engine=vllm", "rollouts.vllm={dtype: bfloat16}") == 0.5
    assert share("rollouts.engine=vllm", "rollouts.mode=server") is None


def test_types_references_and_optimizers(load, supervised: str) -> None:
    half, _ = load(supervised, "model.dtype=bfloat16", "training.bf16=true", "training.optim=sgd")
    found = terms(
        estimate_memory(half, Needs(data=("completions",), reference=True), sequence_tokens=512, sequences_per_rank=1)
    )
    assert found["weights"] == found["gradients"] == found["optimizer"] == found["reference"] == 2 * PARAMETERS
    autocast, _ = load(supervised, "training.bf16=true")
    found = terms(estimate_memory(autocast, ROWS, sequence_tokens=512, sequences_per_rank=1))
    assert found["weights"] == 4 * PARAMETERS and found["autocast copies"] == 2 * PARAMETERS


def test_lora_trains_little_and_needs_no_reference_copy(load, supervised: str) -> None:
    recipe, _ = load(supervised, "model.peft={r: 16}", "model.dtype=bfloat16")
    needs = Needs(data=("completions",), reference=True)
    estimate = estimate_memory(recipe, needs, sequence_tokens=512, sequences_per_rank=1)
    found = terms(estimate)
    assert estimate.trainable == 24 * 16 * (3 * (896 + 4864) + 2 * (896 + 896) + 2 * (896 + 128))
    assert found["adapter"] == found["gradients"] == 4 * estimate.trainable
    assert found["weights"] == 2 * PARAMETERS and "reference" not in found


def test_sampling_terms(load, online: str) -> None:
    recipe, _ = load(online, "rollouts.max_batch=10")
    found = terms(estimate_memory(recipe, SAMPLES, sequence_tokens=128, sequences_per_rank=32))
    assert found["KV cache"] == 10 * 128 * 2 * 2 * 32 * 4  # rows, tokens, layers, keys and values, width, bytes
    estimate = estimate_memory(recipe, SAMPLES, sequence_tokens=128, sequences_per_rank=4)
    assert terms(estimate)["KV cache"] == 4 * 128 * 2 * 2 * 32 * 4
    fixed = sum(size for _, size, _ in estimate.fixed)
    training, sampling = (sum(size for _, size, _ in part) for part in (estimate.training, estimate.sampling))
    assert estimate.peak == fixed + max(training, sampling)


def test_what_is_not_known_is_said(load, supervised: str) -> None:
    recipe, _ = load(supervised)
    estimate = estimate_memory(recipe, ROWS, sequence_tokens=None, sequences_per_rank=1)
    assert estimate.peak is None and estimate.fixed and any("set data.max_length" in note for note in estimate.notes)
    recipe, _ = load(supervised, "model.path=someone/some-model")
    estimate = estimate_memory(recipe, ROWS, sequence_tokens=512, sequences_per_rank=1)
    assert estimate.parameters is None and estimate.peak is None
    assert estimate.notes == ["unknown shape of 'someone/some-model', memory not estimated"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_bound_what_autograd_keeps(
    load, online: str, architecture: str, checkpointing: bool, bf16: bool
) -> None:
    """The estimate is above the tensors that a real forward pass saves for its backward pass, and not far above."""
    torch = pytest.importorskip("torch")
    from posttrain.models.initial import build_model, build_tokenizer

    init = f"{{architecture: {architecture}, hidden_size: 128, layers: 4, heads: 4, kv_heads: 2}}"
    recipe, _ = load(
        online,
        f"model.init={init}",
        f"training.gradient_checkpointing={str(checkpointing).lower()}",
        f"training.bf16={str(bf16).lower()}",
        "batch.micro_batch=4",
    )
    model = build_model(
        recipe.model.init, build_tokenizer(recipe.model.init.tokenizer, None), seed=0, dtype=torch.float32
    )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    # Weights and their autocast copies have terms of their own.
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}
    held = []  # keeps storages alive, so that no address is counted for two tensors

    def note(tensor):
        if tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    ids = torch.randint(4, 100, (4, 128))
    attention = torch.ones_like(ids)
    attention[:, :5] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.model(input_ids=ids, attention_mask=attention)
    found = terms(estimate_memory(recipe, SAMPLES, sequence_tokens=128, sequences_per_rank=32))
    estimated = found["activations"] + found["head"]
    # Under checkpointing the one layer that is computed again is estimated but not saved here.
    assert sum(kept.values()) <= estimated <= sum(kept.values()) * (12 if checkpointing else 1.6)


def test_sizes_as_text() -> None:
    assert gibibytes(3 * 2**30 // 2) == "1.50 GiB" and gibibytes(5 * 2**20) == "5.0 MiB"
