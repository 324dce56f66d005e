"""Rollouts, tensors and weights as files of a checkpoint, exactly: safetensors with JSON values in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.data.sample import Origin, Sample

PLAIN = (
    "problem_id",
    "group",
    "policy_version",
    "outcome",
    "reward",
    "finished",
    "verdict",
    "prefix",
    "info",
    "guided",
    "limit",
    "turn_rewards",
    "part",
)
"""Fields of a sample that are JSON values."""


def pack(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Samples with behaviour log-probs as flat tensors, and the rest of each as JSON values."""
    tensors = {
        "ids": torch.tensor([token for sample in samples for token in sample.ids], dtype=torch.int64),
        "mask": torch.tensor([bit for sample in samples for bit in sample.loss_mask], dtype=torch.uint8),
        "logps": torch.tensor([x for sample in samples for x in sample.behaviour_logps], dtype=torch.float64),
    }
    rest = [
        {"length": len(sample.ids), "origin": sample.origin.value, **{name: getattr(sample, name) for name in PLAIN}}
        for sample in samples
    ]
    return tensors, rest


def unpack(tensors: Mapping[str, Tensor], rest: Sequence[dict[str, Any]]) -> list[Sample]:
    """What `pack` was given."""
    ids, mask, logps = (tensors[name].tolist() for name in ("ids", "mask", "logps"))
    samples, start = [], 0
    for values in rest:
        end = start + values["length"]
        plain = {name: values[name] for name in PLAIN if name in values}  # older checkpoints lack some
        samples.append(
            Sample(ids[start:end], mask[start:end], Origin(values["origin"]), behaviour_logps=logps[start:end], **plain)
        )
        start = end
    return samples


def write(path: Path, tensors: Mapping[str, Tensor], values: Any) -> None:
    """Tensors and JSON values as one file."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, {"values": json.dumps(values)})


def read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `write` was given."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["values"])  # noqa: SIM118


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
