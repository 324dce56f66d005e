"""`posttrain play` and `check` of a recipe with an environment, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.errors import NeedsError, PosttrainError, RecipeError

RECIPE = {
    "model": {
        "init": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 256},
        "chat_template": "{% for m in messages %}{{ m.content + '<eos>' if m.role == 'assistant' else '<bos>' "
        "+ m.content + '>' }}{% endfor %}",
    },
    "data": {"prompts": {"task": "rooms", "levels": [2, 3], "size": 40}},
    "environment": {"type": "rooms", "max_turns": 12, "episode_tokens": 256, "workers": 0},
    "rollouts": {"samples_per_prompt": 2, "max_new_tokens": 4},
    "method": {"name": "grpo"},
    "batch": {"prompts_per_step": 2, "micro_batch": 4},
    "training": {"learning_rate": 1e-3, "max_steps": 1},
    "output": "run",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def call(*words: str, typed: str = "") -> str:
    """What the command prints; errors are raised, as `main` sees them."""
    return CliRunner().invoke(app, list(words), catch_exceptions=False, input=typed).output


def test_an_expert_solves_what_a_weak_agent_often_does_not(folder):
    expert = call("play", "recipe.yaml", "--agent", "expert", "--episodes", "40", "--out", "episodes.jsonl")
    assert "40 episodes in episodes.jsonl" in expert and "> open chest" in expert
    line = next(line for line in expert.splitlines() if line.split()[:1] == ["all"])
    assert line.split()[1:3] == ["40", "1.000"] and line.endswith("done 40")
    rows = [json.loads(row) for row in Path("episodes.jsonl").read_text().splitlines()]
    assert all(row["return"] == row["outcome"] == 1.0 for row in rows)
    weak = call("play", "recipe.yaml", "--agent", "weak", "--episodes", "40")
    assert "turn_limit" in weak
    assert "40 episodes went as they did before" in call("play", "recipe.yaml", "--again", "episodes.jsonl")
    changed = [row | {"opening": "elsewhere"} if place == 3 else row for place, row in enumerate(rows)]
    Path("episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(PosttrainError, match="1 of 40 episodes"):
        call("play", "recipe.yaml", "--again", "episodes.jsonl")


def test_several_episodes_of_each_problem(folder):
    for agent in ("policy", "weak"):
        said = call("play", "recipe.yaml", "--agent", agent, "--episodes", "3", "--samples", "4", "--out", "e.jsonl")
        rows = [json.loads(row) for row in Path("e.jsonl").read_text().splitlines()]
        assert [(row["problem"]["id"], row["sample"]) for row in rows] == [
            (f"prompts/{problem}", sample) for problem in range(3) for sample in range(4)
        ]
        assert all(len({row["seed"] for row in rows[start : start + 4]}) == 1 for start in (0, 4, 8))
        assert len({str(row["turns"]) for row in rows[:4]}) > 1
        line = next(line for line in said.splitlines() if line.split()[:1] == ["all"])
        assert line.split()[1] == "12"
    with pytest.raises(RecipeError, match="all alike"):
        call("play", "recipe.yaml", "--greedy", "--samples", "2")


def test_the_policy_and_a_person_play(folder):
    policy = call("play", "recipe.yaml", "environment.invalid_in_a_row=2", "--episodes", "6")
    assert "all" in policy and "6" in policy and ("cut" in policy or "gave_up" in policy)
    person = call(
        "play", "recipe.yaml", "environment.max_turns=2", "--agent", "person", "--episodes", "1", typed="a\nb\n"
    )
    assert "exits" in person and "turn_limit 1" in person


def test_check_loads_the_environment_and_shows_the_beginning(folder):
    assert "environment: prompts/0 begins with '' behind its prompt" in call("check", "recipe.yaml")
    Path("mine.py").write_text("class Mine:\n    def __init__(self):\n        raise RuntimeError('not today')\n")
    own = yaml.safe_dump(RECIPE | {"environment": {"type": "python", "factory": "mine.py:Mine", "episode_tokens": 256}})
    Path("own.yaml").write_text(own)
    checked = call("check", "own.yaml")  # says what would run, and runs none of it
    assert "environment" in checked and "mine.py:Mine" in checked
    with pytest.raises(PosttrainError, match="not today"):
        call("check", "own.yaml", "--run-code")


def test_what_cannot_be_played_is_refused(folder):
    with pytest.raises(RecipeError, match="no agent 'exprt'") as wrong:
        call("play", "recipe.yaml", "--agent", "exprt")
    assert "did you mean 'expert'" in wrong.value.hint
    with pytest.raises(RecipeError, match="40 problems, and 41"):
        call("play", "recipe.yaml", "--agent", "expert", "--episodes", "41")
    with pytest.raises(RecipeError, match="--greedy"):
        call("play", "recipe.yaml", "--agent", "expert", "--greedy")
    Path("plain.yaml").write_text(yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "environment"}))
    with pytest.raises(NeedsError, match="no environment"):
        call("play", "plain.yaml", "verifier=[{type: procedural}]")


def test_episodes_are_training_data_as_they_are(folder):
    """The column `messages` of what an expert played: all its actions are trained on, and nothing else."""
    call("play", "recipe.yaml", "--agent", "expert", "--episodes", "12", "--out", "episodes.jsonl")
    data = {"completions": {"path": "episodes.jsonl", "messages": "messages"}}
    training = {"batch": {"rows_per_step": 4, "micro_batch": 4}, "method": {"name": "sft"}, "data": data}
    kept = {key: RECIPE[key] for key in ("model", "training", "output")}
    Path("sft.yaml").write_text(yaml.safe_dump(kept | training))
    checked = call("check", "sft.yaml")
    shown = next(line for line in checked.splitlines() if "[[go " in line or "[[take " in line)
    first = json.loads(Path("episodes.jsonl").read_text().splitlines()[0])
    actions = [turn["action"] for turn in first["turns"]]
    assert [piece.split("<eos>]]")[0] for piece in shown.split("[[")[1:]] == actions
