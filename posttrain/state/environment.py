"""What a run ran on: written beside its checkpoints so that a result can be traced."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

import torch

from posttrain.config.stack import stack


def environment() -> dict[str, Any]:
    """Package versions, machine, working folder and its git state, as JSON values; no environment variables."""
    return {
        "packages": {package.name: package.installed for package in stack() if package.installed},
        "outside_tested_range": [package.name for package in stack() if package.ok is False],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git(),
        "folder": os.getcwd(),
    }


def _git() -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes; None outside a repository or without git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "uncommitted_changes": bool(changes.stdout.strip())}
