"""The speed benchmark itself: its two sides compute the same; and bench/ holds speed alone, in few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "train_speed.py"
KINDS = ("policy", "prefix", "short-prompt", "one-completion", "dpo", "reference", "distill")


def test_bench_is_small() -> None:
    """What compares methods is a study; bench/ compares speed."""
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in SCRIPT.parent.glob("*.py"))
    assert lines < 1500, f"{lines} lines in bench/: studies belong into studies/, finished comparisons into docs/log.md"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("workload", KINDS)
def test_both_sides_compute_the_same(workload: str, tmp_path: Path) -> None:
    done = run(workload, "--size", "1m", "--check", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found["loss_difference"] <= 1e-5 and "speed" not in found
    assert workload == "reference" or 0 < found["gradient_difference"] <= 1e-4


@pytest.mark.slow
def test_both_sides_compute_the_same_on_pictures() -> None:
    command = [sys.executable, str(SCRIPT.with_name("picture_speed.py")), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" x ") == 10 + 1  # five families, two shapes, and the head of the table
