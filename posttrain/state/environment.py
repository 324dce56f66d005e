"""What a run ran on: written beside its checkpoints so that a result can be traced."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import torch

from posttrain.config.stack import stack


def environment() -> dict[str, Any]:
    """Package versions, machine, working folder and its git state, as JSON values; no environment variables."""
    packages = stack()
    return {
        "packages": {package.name: package.installed for package in packages if package.installed},
        "outside_tested_range": [package.name for package in packages if package.ok is False],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git(),
        "folder": os.getcwd(),
    }


def _git() -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes; None outside a repository or without git.

    The folder may be anybody's, and a repository's own settings name programs that `git status` runs. None of them is:
    a monitor of files, hooks, filters of contents, whatever a submodule's settings name, and what would fetch objects
    that the repository lacks.
    """
    try:
        commit = _ask_git("rev-parse", "HEAD").stdout.strip()
        filters = _ask_git(
            "config", "-z", "--name-only", "--get-regexp", r"^filter\..*\.(clean|process|required)$", check=False
        )
        off = {"core.fsmonitor": "false", "core.hooksPath": os.devnull}
        off |= {name: "" for name in filters.stdout.split("\0") if name}
        status = _ask_git("status", "--porcelain", "--ignore-submodules=all", settings=off)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "uncommitted_changes": bool(status.stdout.strip())}


def _ask_git(
    *arguments: str, check: bool = True, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What git says in the working folder, with some settings in place of the repository's. It writes nothing."""
    given = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_COUNT": str(len(settings or {}))}
    given |= {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": ""}  # which older ones know alone
    for number, (name, value) in enumerate((settings or {}).items()):
        given |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return subprocess.run(
        ["git", *arguments],
        capture_output=True,
        text=True,
        check=check,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=os.environ | given,
    )
