from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "trl", "accelerate", "peft", "matplotlib", "numpy")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_configuration_loads_no_heavy_package() -> None:
    modules = "batch, effects, loading, memory, needs, preflight, schema, shapes, stack"
    statement = f"from posttrain.config import {modules}"
    assert loaded_by(statement) == set()


def test_the_probe_would_notice() -> None:
    assert "numpy" in loaded_by("import numpy")
