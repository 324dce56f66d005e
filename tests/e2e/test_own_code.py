"""A stranger's folder: a recipe, a reward in a file, nothing of this repository."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app

REWARD = '''
"""Pays for sevens, as nobody else would."""
print("loaded")

def sevens(completion, limit, label):
    if completion.startswith("0"):
        raise ValueError("starts with nothing")
    print("judging", completion)
    return min(completion.count("7"), limit) / limit + (label == "bonus")
'''


@pytest.fixture
def stranger(tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "stranger"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "rewards.py").write_text(REWARD)
    rows = [{"question": f"{n}+{n}=", "label": "bonus" if n % 2 else "none"} for n in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": {"path": str(folder / "rows.jsonl"), "prompt": "question", "chat": False}},
        "verifier": [{"type": "python", "function": "lib/rewards.py:sevens", "options": {"limit": 4}}],
        "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 8},
        "method": {"name": "grpo"},
        "batch": {"prompts_per_step": 4, "micro_batch": 16},
        "training": {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3},
        "output": str(tmp_path / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)  # the recipe's folder is another
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return f"{result.output}\n{result.exception}"


def test_a_reward_in_a_file_trains_and_is_part_of_the_run(stranger, tmp_path):
    recipe, out = stranger / "recipe.yaml", tmp_path / "run"
    said = run("check", recipe)
    assert "no code of it runs here" in said and "runs " in said and "lib/rewards.py:sevens (sha256" in said
    assert not out.exists()

    run("train", recipe, "training.max_steps=2")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    log = (out / "verifier.log").read_text()
    assert "loaded" in log and "judging" in log
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {sample["verdict"] for sample in samples} <= {"correct", "wrong", "crash"}

    longer = ["training.max_steps=3", "--resume", "auto", "--allow-changed", "training.max_steps"]
    run("train", recipe, *longer)
    (stranger / "lib" / "rewards.py").write_text(REWARD + "\n# another reward\n")
    refused = run("train", recipe, "training.max_steps=4", *longer[1:], code=1)
    assert "content.code" in refused

    recipe.write_text(recipe.read_text().replace("sevens", "eights"))
    assert "known: sevens" in run("check", recipe, code=1)
