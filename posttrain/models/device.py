"""Where models run. Imports without torch."""

from __future__ import annotations

import ctypes
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from posttrain.config.memory import Device
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.lazy import torch

FLEX = "flex_attention"
"""transformers' name of FlexAttention."""


def device_type() -> Device:
    """The device of this machine, for estimates. Does not import torch where its build and the driver tell enough."""
    if "torch" not in sys.modules and not _may_have_gpu():
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _may_have_gpu() -> bool:
    """Whether torch is built for GPUs, and NVIDIA's driver, where it is built for that, finds one."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    if re.search(r"^hip\b.*=\s*['\"]", version, re.MULTILINE):
        return True
    return bool(re.search(r"^cuda\b.*=\s*['\"]", version, re.MULTILINE)) and _nvidia_gpus() > 0


def _nvidia_gpus() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def check_gradients(config: ModelConfig, device: Device) -> None:
    """Refuse an attention that has no gradients on this device.

    Raises:
        ModelError: FlexAttention is asked for, and PyTorch has no gradients for it on this device.
    """
    if config.attn_implementation == FLEX and device == "cpu":
        raise ModelError(
            "PyTorch has no gradients for FlexAttention on a CPU, and there is no GPU here",
            where="model.attn_implementation",
            hint="use sdpa (the default), or train on a GPU; sampling and evaluation run on a CPU with it",
        )
