"""Two ranks train on pictures what one trains, all parts, also where a rank sees none."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from posttrain.config.loading import load_recipe
from posttrain.methods import CONFIGS
from posttrain.models.loading import load_policy
from posttrain.trainers.run import train

pytestmark = pytest.mark.slow

LAUNCH = runpy.run_path(str(Path(__file__).with_name("test_launch.py")))
TRAINED = ["language", "projector", "tower"]
LAUNCHES = ("cpu", "zero2", "zero3", "fsdp2")
METHODS = {"sft": "completions", "grpo": "prompts"}


def rows(folder: Path) -> Path:
    """Every third row shows no picture, and every fourth two: of a step some ranks have none in a micro-batch."""
    random, lines = np.random.RandomState(0), []
    for number in range(16):
        Image.fromarray(random.randint(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        shown = [] if number % 3 == 0 else ["1.png", f"{number}.png"] if number % 4 == 0 else [f"{number}.png"]
        lines.append({"prompt": f"which {number}? ", "images": shown, "completion": "ab", "answer": "ab"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def recipe(folder: Path, file: Path, method: str) -> Path:
    source = {"path": str(file), "images": "images"}
    source |= {"reference": "answer"} if method == "grpo" else {}
    tower = {"image_size": 16, "patch_size": 8, "hidden_size": 16}
    made: dict[str, Any] = {
        "model": {
            "init": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64},
            "pictures": {"train": TRAINED, "init": tower},
        },
        "data": {METHODS[method]: source},
        "method": {"name": method},
        "batch": {"micro_batch": 2, "prompts_per_step" if method == "grpo" else "rows_per_step": 4},
        "training": {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 3},
        "output": str(folder / method),
    }
    if method == "grpo":
        made["verifier"] = [{"type": "exact"}, {"type": "length", "max": 6, "buffer": 6, "unit": "characters"}]
        made["rollouts"] = {"samples_per_prompt": 4, "max_new_tokens": 6}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_ranks_train_what_one_trains(launch: str, tmp_path: Path) -> None:
    LAUNCH["needs_deepspeed"](launch)
    file, alone, together = rows(tmp_path), tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    for method in METHODS:
        asked = load_recipe(recipe(alone, file, method), [], CONFIGS)
        train(asked)
    start = load_policy(asked.model, seed=asked.seed)[0].state_dict()
    recipes = [recipe(together, file, method) for method in METHODS]
    LAUNCH["launch"](together, launch, LAUNCH["SCRIPTS"] / "train_recipes.py", *recipes)
    for method in METHODS:
        one, two = (load_file(folder / method / "model" / "model.safetensors") for folder in (alone, together))
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=f"{method} {name}")
        moved = {"vision" in name for name in one if not torch.equal(one[name], start[name])}
        assert moved == {True, False}
