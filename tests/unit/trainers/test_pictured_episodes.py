"""Environments that show pictures: played, recorded, played again, and trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from safetensors.torch import load_file

from posttrain.cli.play import again_command, play_command
from posttrain.config.loading import load_recipe
from posttrain.data import pictures
from posttrain.data.episodes import read_episodes
from posttrain.data.picture_text import FIRST
from posttrain.environments.base import Failure, Step
from posttrain.environments.pictures import shown, taken_in
from posttrain.errors import DataError
from posttrain.methods import CONFIGS
from posttrain.models.loading import load_policy
from posttrain.models.processor import OLDEST
from posttrain.trainers.run import train

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < OLDEST, reason="an older transformers, with which pictures are refused"
)

TEMPLATE = (
    "{% for m in messages %}{{ '' if m.role == 'assistant' else '<bos>' }}"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{{ '<eos>' if m.role == 'assistant' else '>' }}{% endfor %}"
)
SEEN = """
import sys
sys.path.insert(0, ROOMS)
from drawn_rooms import DrawnRooms
from posttrain.environments.base import Step

class Seen(DrawnRooms):
    def step(self, action):
        step = super().step("go north" if "g" in action else "go east")
        return Step(step.observation, reward=len(set(action)) / 10, done=step.done)
"""
ROOMS = Path(__file__).resolve().parents[3] / "recipes" / "agents"
ALL = ["language", "projector", "tower"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "seen.py").write_text(SEEN.replace("ROOMS", repr(str(ROOMS))))
    rows = [{"prompt": "ab", "level": 4, "world": world} for world in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(folder: Path, **changes: Any) -> Path:
    """A recipe file; sections by name."""
    made: dict[str, Any] = {
        "model": {
            "init": {
                "hidden_size": 16,
                "layers": 1,
                "heads": 2,
                "max_length": 256,
                "tokenizer": {"type": "characters", "alphabet": "abgno>"},
            },
            "pictures": {"train": ALL, "init": {"image_size": 16, "patch_size": 8, "hidden_size": 16}},
            "chat_template": TEMPLATE,
        },
        "data": {"prompts": {"path": str(folder / "rows.jsonl")}},
        "environment": {
            "type": "python",
            "factory": f"{folder / 'seen.py'}:Seen",
            "max_turns": 3,
            "episode_tokens": 200,
            "workers": 1,
        },
        "method": {"name": "grpo"},
        "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 8},
        "batch": {"prompts_per_step": 2, "micro_batch": 4},
        "training": {"learning_rate": 0.01, "max_steps": 2},
        "output": str(folder / "run"),
    } | changes
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in made.items() if value is not None}))
    return file


def test_what_an_environment_shows_is_learnt_from(folder: Path) -> None:
    """On-policy, from a file of what was played, and along it; pictures are read and never trained on."""
    file = recipe(folder)
    asked = load_recipe(file, [], CONFIGS)
    run = train(asked).run_dir
    assert "[picture " in (run / "samples.jsonl").read_text()
    before, after = (
        load_policy(asked.model, seed=asked.seed)[0].state_dict(),
        load_file(run / "model/model.safetensors"),
    )
    assert any("vision" in name and not torch.equal(after[name], before[name]) for name in after)
    played = folder / "played.jsonl"
    overrides = [f"model.path={run / 'model'}", "model.init=null", f"model.pictures={{train: {ALL}}}"]
    play_command(file, overrides, agent="policy", episodes=4, samples=4, greedy=False, out=played)
    again_command(file, overrides, played)
    assert list((folder / "played.pictures").iterdir())
    pictures.ALBUM.clear()
    episodes = list(read_episodes(played))
    assert max(sum(token >= FIRST for token in episode.ids) for episode in episodes) > 8  # of several turns
    assert not any(m for episode in episodes for m, id in zip(episode.mask, episode.ids, strict=True) if id >= FIRST)
    model = {"path": str(run / "model"), "pictures": {"train": ALL}}
    along = {"type": "recorded", "path": str(played), "max_turns": 3, "episode_tokens": 200}
    rows = {"rows_per_step": 4, "micro_batch": 4}
    traces = {
        "data": {"traces": {"path": str(played), "keep": "all"}, "max_lost_share": 1.0},
        "batch": rows,
        "rollouts": None,
    }
    for name, changes in (("digirl", traces | {"environment": None}), ("ui_s1", {"environment": along})):
        pictures.ALBUM.clear()
        made = recipe(folder, method={"name": name}, output=str(folder / name), model=model, **changes)
        logged = train(load_recipe(made, [], CONFIGS)).run_dir / "metrics.jsonl"
        rows_logged = [json.loads(line) for line in logged.read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) for row in rows_logged if "loss" in row)


def test_a_picture_that_cannot_be_read_ends_its_episode() -> None:
    seen = taken_in(shown(b"no picture"))
    assert isinstance(seen, Failure) and "no picture that can be read" in seen.detail
    many = taken_in(Step("x".join(shown(b"no picture") for _ in range(9))))
    assert isinstance(many, Failure) and "more than 8 pictures" in many.detail
    assert taken_in(Step("text")) == Step("text")


def test_a_model_of_text_says_what_it_lacks(folder: Path) -> None:
    made = yaml.safe_load(recipe(folder).read_text())["model"]
    del made["pictures"]
    with pytest.raises(DataError, match="the model is loaded as one of text"):
        train(load_recipe(recipe(folder, model=made), [], CONFIGS))
