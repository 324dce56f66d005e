"""Where models run."""

from __future__ import annotations

import torch

from posttrain.config.memory import Device


def device_type() -> Device:
    """The device of this machine, for estimates."""
    return "cuda" if torch.cuda.is_available() else "cpu"
