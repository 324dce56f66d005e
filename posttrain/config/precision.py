"""Whether updates of the size of the learning rate change weights that are stored in 16 bits. Imports without torch.

A weight w in [2^e, 2^(e+1)) of a type with p bits of significand lies on a grid of spacing 2^(e+1-p). Rounding to the
nearest brings it back unless the update is at least half of that, 2^(e-p). An update of Adam (or Lion) is about as
large as the learning rate. So the weights that can move have e <= log2(learning rate) + p: of bfloat16 (p = 8) at 1e-6
those below 2^-11 = 0.0005 in magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from posttrain.config.foreign_files import read_header
from posttrain.config.positions import config_json
from posttrain.config.schema import ModelConfig, Recipe

BITS = {"bfloat16": 8, "float16": 11}
"""Bits of the significand, the hidden one included."""

SMALLEST = {"bfloat16": -126, "float16": -14}
"""Exponent below which the grid gets no finer."""

STORED = {"BF16": (np.uint16, 7, 8), "F16": (np.uint16, 10, 5), "F32": (np.uint32, 23, 8)}
"""Type in a safetensors file -> how it is read, bits behind the point, bits of the exponent."""

SIGN_SIZED = ("adam", "lion")
"""Optimizers whose updates are about as large as the learning rate have one of these in their name."""

FEW = 0.5
TENSORS, SAMPLES = 48, 2048
"""Tensors of a model that are looked at, and evenly spaced weights of each."""

INITIALIZER_RANGE = 0.02
"""transformers' own standard deviation of weights that it makes, for models that are not here."""


def precision_warning(recipe: Recipe) -> str | None:
    """What to say where fewer than half of the weights can move; None where that is not so, or not known.

    With an adapter the trained weights are the adapter's, which PEFT keeps in float32.
    """
    dtype, rate = recipe.model.dtype, recipe.training.learning_rate
    adam_like = any(name in recipe.training.optim for name in SIGN_SIZED)
    if dtype not in BITS or recipe.model.peft is not None or not adam_like:
        return None
    share = share_that_moves(recipe.model, rate)
    if share >= FEW:
        return None
    return (
        f"of the {dtype} weights about {share:.0%} can move at learning rate {rate:g}: an update that is smaller than "
        "half the distance to the next number is rounded back. Set model.dtype: float32 and training.bf16: true, "
        "which computes in bfloat16 and keeps the weights in float32"
    )


def share_that_moves(model: ModelConfig, learning_rate: float) -> float:
    """Share of the model's weights that an update of this size changes, if they are stored as `model.dtype`."""
    limit = largest_exponent(model.dtype, learning_rate)
    exponents, sizes = [], []
    for values, size in _weights(model):
        exponents.append(float(np.mean(values <= limit)))
        sizes.append(size)
    if not sizes:
        sigma = (config_json(model) or {}).get("initializer_range", INITIALIZER_RANGE)
        return math.erf(2.0 ** (limit + 1) / sigma / math.sqrt(2))
    return float(np.average(exponents, weights=sizes))


def largest_exponent(dtype: str, learning_rate: float) -> int:
    """Largest e such that weights in [2^e, 2^(e+1)) of this type move by an update of the size of the rate.

    Below the smallest normal numbers the grid is the same for all, so there it is all weights or none.
    """
    found = math.floor(math.log2(learning_rate)) + BITS[dtype]
    return found if found >= SMALLEST[dtype] else -(10**6)


def _weights(model: ModelConfig) -> Iterator[tuple[np.ndarray, int]]:
    """(exponents of some weights, size) of some matrices of a local folder's safetensors files."""
    folder = Path(model.path or "").expanduser()
    if model.path is None or not folder.is_dir():
        return
    entries = [
        (file, start, entry)
        for file in sorted(folder.glob("*.safetensors"))
        for start, entry in _entries(file)
        if entry["dtype"] in STORED and len(entry["shape"]) >= 2
    ]
    for file, start, entry in entries[:: max(1, len(entries) // TENSORS)]:
        kind, behind, width = STORED[entry["dtype"]]
        size = math.prod(entry["shape"])
        found = np.memmap(file, kind, "r", start + entry["data_offsets"][0], (size,))[:: max(1, size // SAMPLES)]
        raw = (np.asarray(found).astype(np.int64) >> behind) & ((1 << width) - 1)
        yield raw - ((1 << (width - 1)) - 1), size


def _entries(file: Path) -> Iterator[tuple[int, dict]]:
    """(where the data begin, entry) of every tensor of a safetensors file."""
    start, header = read_header(file)
    for name, entry in header.items():
        if name != "__metadata__":
            yield start, entry
