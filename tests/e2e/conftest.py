"""Models and recipes that vLLM runs: its CPU kernels take heads of 32 and more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

VLLM_INIT = {
    "hidden_size": 64,
    "layers": 2,
    "heads": 2,
    "max_length": 96,
    "tokenizer": {"type": "characters", "alphabet": "0123456789+=;#"},
}


@pytest.fixture
def plugins_forgotten():
    """What plugins register in a test is gone afterwards."""
    import sys

    from posttrain.config import plugins
    from posttrain.config.effects import LOCAL_SUFFIXES
    from posttrain.data.readers import READERS
    from posttrain.data.tasks import TASKS
    from posttrain.evaluation.benchmarks import BENCHMARKS
    from posttrain.methods import METHODS
    from posttrain.tracking.metrics import METRICS, require
    from posttrain.trainers.callbacks import CALLBACKS
    from posttrain.verifiers import VERIFIERS

    tables = (METHODS.entries, TASKS.entries, BENCHMARKS.entries, VERIFIERS.entries, METRICS, READERS)
    before = [(known, dict(known)) for known in tables]
    callbacks, places, endings = list(CALLBACKS), list(plugins.loaded), list(LOCAL_SUFFIXES)
    yield
    for known, held in before:
        known.clear()
        known.update(held)
    require.cache_clear()
    CALLBACKS[:], plugins.loaded[:], LOCAL_SUFFIXES[:] = callbacks, places, endings
    for name in [name for name in sys.modules if name.startswith("posttrain_own_")]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model; like `tiny_model`, with larger heads."""
    from posttrain.config.schema import ModelConfig
    from posttrain.models.loading import load_policy

    folder = tmp_path_factory.mktemp("vllm") / "model"
    model, tokenizer = load_policy(ModelConfig(init=VLLM_INIT), seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def load_vllm_recipe(vllm_model: Path, make_recipe_data, tmp_path: Path):
    """`load_vllm_recipe(method, changes)` -> a validated recipe on `vllm_model` with engine vllm."""
    from posttrain.config.loading import load_recipe
    from posttrain.methods import METHODS

    def make(method: dict[str, Any], changes: dict[str, Any] | None = None):
        data = make_recipe_data(vllm_model, tmp_path, method, {"rollouts.engine": "vllm", **(changes or {})})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        return load_recipe(tmp_path / "recipe.yaml", [], {name: cls.Config for name, cls in METHODS.items()})

    return make
