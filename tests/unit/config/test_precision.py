"""The share of weights that an update moves, against rounding itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from posttrain.config.precision import largest_exponent, precision_warning, share_that_moves
from posttrain.config.schema import ModelConfig, ModelInit

INIT = ModelInit(hidden_size=16, layers=1)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("rate", [1e-6, 1e-5, 3e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_share_is_that_of_rounding(tmp_path, dtype, rate, stored) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.weight": (torch.randn(64, 64, generator=generator) * 0.02 * (i + 1)).to(stored) for i in range(4)
    }
    save_file({**tensors, "norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    weights = torch.cat([tensor.flatten() for tensor in tensors.values()]).to(TYPES[dtype])
    moved = sum(((weights.double() + sign * rate).to(weights.dtype) != weights).double().mean() for sign in (1, -1)) / 2
    found = share_that_moves(ModelConfig(path=str(tmp_path), dtype=dtype), rate)
    # all 16,384 weights are looked at; they may differ where rounding to the type carries into the next power of two
    assert found == pytest.approx(float(moved), abs=4 * 0.5 / len(weights) ** 0.5)


def test_weights_that_are_not_here_are_taken_as_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(1 << 18, generator=generator) * 0.02).bfloat16()
    moved = float(((weights.double() + 1e-6).bfloat16() != weights).double().mean())
    assert share_that_moves(ModelConfig(init=INIT, dtype="bfloat16"), 1e-6) == pytest.approx(moved, abs=2e-3)
    assert moved == pytest.approx(0.02, abs=2e-3)


def test_the_largest_exponent_by_hand() -> None:
    # 2^-20 < 1e-6 < 2^-19, and 8 bits of significand: weights below 2^-11
    assert largest_exponent("bfloat16", 1e-6) == -12
    assert largest_exponent("float16", 1e-6) == -9
    assert largest_exponent("float16", 1e-8) < -24  # below half of the finest grid, 2^-25: nothing moves


def recipe(dtype: str, rate: float, *, optim: str = "adamw_torch_fused", peft: object = None) -> SimpleNamespace:
    model = ModelConfig(init=INIT, dtype=dtype).model_copy(update={"peft": peft})
    return SimpleNamespace(model=model, training=SimpleNamespace(learning_rate=rate, optim=optim))


def test_who_is_warned() -> None:
    said = precision_warning(recipe("bfloat16", 1e-6))
    assert "about 2% can move" in said and "model.dtype: float32 and training.bf16: true" in said
    assert "float16 weights" in precision_warning(recipe("float16", 1e-6))
    for healthy in (
        recipe("float32", 1e-6),
        recipe("bfloat16", 1e-3),
        recipe("bfloat16", 1e-6, optim="sgd"),  # how large its updates are, nobody knows before
        recipe("bfloat16", 1e-6, peft=object()),  # adapters are float32
    ):
        assert precision_warning(healthy) is None
