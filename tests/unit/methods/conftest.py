"""What tests of whole runs read of their folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def _weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="session")
def weights() -> Callable[[str | Path], dict[str, torch.Tensor]]:
    """`weights(folder)` -> the tensors of a saved model."""
    return _weights


@pytest.fixture(scope="session")
def same() -> Callable[[str | Path, str | Path], bool]:
    """`same(one, other)`: whether two saved models are equal bit for bit."""

    def compare(one: str | Path, other: str | Path) -> bool:
        left, right = _weights(one), _weights(other)
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    return compare


@pytest.fixture(scope="session")
def metrics() -> Callable[[str | Path], list[dict[str, Any]]]:
    """`metrics(run_dir)` -> the log entries of training."""

    def read(run_dir: str | Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "loss" in row]

    return read
