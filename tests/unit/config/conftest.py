from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from posttrain.config.loading import load_recipe_with_locations
from posttrain.config.schema import Section


class CloneConfig(Section):
    """A supervised method."""

    name: Literal["clone"] = "clone"


class RewardConfig(Section):
    """An online method with the kinds of field that methods have."""

    name: Literal["reward"] = "reward"
    beta: float = Field(0.0, ge=0)
    window: tuple[float, float] = (0.1, 0.9)
    clip: Literal["hard", "soft"] = "hard"
    cap: float = Field(5.0, gt=0)
    passes: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _effective(self) -> RewardConfig:
        if self.clip == "hard" and "cap" in self.model_fields_set:
            raise ValueError("cap has no effect with clip hard")
        return self


METHODS = {"clone": CloneConfig, "reward": RewardConfig}

ONLINE = """\
model: {init: {hidden_size: 32, layers: 2}}
data:
  prompts:
    task: chain_sum
    levels: [1, 2]
    size: 64
method:
  name: reward
verifier:
  - type: procedural
rollouts: {samples_per_prompt: 4, max_new_tokens: 64}
batch:
  prompts_per_step: 8
  micro_batch: 4
training:
  learning_rate: 1e-6
  max_steps: 5
output: runs/test
"""

SUPERVISED = """\
model: {path: Qwen/Qwen2.5-0.5B}
data:
  completions: {path: traces.jsonl, prompt: question, completion: solution}
method: {name: clone}
batch: {rows_per_step: 16, micro_batch: 8}
training: {num_train_epochs: 2}
output: runs/test
"""


@pytest.fixture
def online() -> str:
    return ONLINE


@pytest.fixture
def supervised() -> str:
    return SUPERVISED


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads recipe text from a file called `recipe.yaml` in the working folder."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str):
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe_with_locations("recipe.yaml", overrides, METHODS)

    return load
