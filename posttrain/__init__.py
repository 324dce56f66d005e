"""posttrain: post-training of language models from one YAML recipe.

The Python interface, which is the command line's:

    import posttrain as pt

    result = pt.train("recipe.yaml", {"training.max_steps": 50})
    report = pt.evaluate(result.model_dir, benchmarks=["gsm8k"], samples=4)
    run = pt.load_run(result.run_dir)

Importing this package is cheap: nothing here loads torch. The command line lives in `posttrain.cli`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.api import Run, compare, evaluate, load_recipe, load_run, sample, train
    from posttrain.errors import PosttrainError

__version__ = "0.1.0"

__all__ = ["PosttrainError", "Run", "compare", "evaluate", "load_recipe", "load_run", "sample", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(import_module("posttrain.errors" if name == "PosttrainError" else "posttrain.api"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
