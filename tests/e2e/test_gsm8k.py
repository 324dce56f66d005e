"""The same command on real GSM8K rows from a local file, with a local random model. Nothing is learned at this size."""

import json
from pathlib import Path

from posttrain.config.loading import load_recipe
from posttrain.methods import METHODS
from posttrain.trainers.run import train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {name: cls.Config for name, cls in METHODS.items()}


def test_grpo_on_gsm8k_rows(test_data, tmp_path):
    recipe = load_recipe(
        ROOT / "recipes" / "math" / "grpo-local-gsm8k.yaml",
        [
            f"data.prompts.path={test_data / 'gsm8k_train.jsonl'}",
            "data.prompts.limit=500",
            "rollouts.max_new_tokens=16",
            "training.max_steps=2",
            "tracking.plots=false",
            f"output={tmp_path / 'run'}",
        ],
        CONFIGS,
    )
    result = train(recipe)
    assert result.steps == 2
    rows = json.loads((result.run_dir / "data.json").read_text())
    assert rows["total"] == rows["kept"] == 500
    samples = [json.loads(line) for line in (result.run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * recipe.rollouts.samples_per_prompt
    assert all(sample["prompt"].startswith("Question: ") and sample["reference"] for sample in samples)
    assert {sample["verdict"] for sample in samples} <= {"correct", "wrong", "no_answer", "unparseable"}
