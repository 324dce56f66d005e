"""A study of agents: arms that act and learn, measured by episodes, at equal environment steps."""

import json

import pytest
import yaml

from posttrain.errors import PosttrainError
from posttrain.study.cell import REQUEST, RESULT, run_cell
from posttrain.study.plan import cell_of, check_study
from posttrain.study.schema import load_study

ROOMS = {"task": "rooms", "levels": [2, 3], "size": 8}
RUN = {"tracking": {"console": "plain", "plots": False}, "output": "unused", "threads": 1}
TRAINING = {"learning_rate": 1e-3, "max_steps": 2}
TEMPLATE = "{% for m in messages %}{{ m.content if m.role == 'assistant' else '<bos>' + m.content + '>' }}{{ '<eos>' "
TEMPLATE += "if m.role == 'assistant' else '' }}{% endfor %}"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`study(changes)`: GRPO in rooms against ArCHer on episodes of the start, which an earlier stage has made."""
    monkeypatch.chdir(tmp_path)
    tokenizer = {"type": "bpe", "vocab_size": 400}
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 512, "tokenizer": tokenizer}
    data = {"completions": ROOMS | {"size": 16, "annotator": "weak"}}
    base = RUN | {"model": {"init": init, "chat_template": TEMPLATE}, "data": data, "method": {"name": "sft"}}
    base |= {"batch": {"rows_per_step": 16, "micro_batch": 16}}
    base |= {"training": {"learning_rate": 1e-2, "max_steps": 40}}  # until most actions end
    grpo = RUN | {"model": {"path": "unused"}, "data": {"prompts": ROOMS}, "method": {"name": "grpo"}}
    grpo |= {"environment": {"type": "rooms", "max_turns": 4, "episode_tokens": 512, "workers": 0}}
    grpo |= {"rollouts": {"samples_per_prompt": 2, "max_new_tokens": 4}, "training": TRAINING}
    grpo |= {"batch": {"prompts_per_step": 2, "micro_batch": 4}}
    archer = RUN | {"model": {"path": "unused"}, "data": {"traces": {"path": "unused", "keep": "all"}}}
    archer |= {"method": {"name": "archer", "actor_freeze_steps": 0}, "rollouts": {"max_new_tokens": 4}}
    archer |= {"batch": {"rows_per_step": 4, "micro_batch": 4}, "training": TRAINING}
    for name, recipe in (("base", base), ("grpo", grpo), ("archer", archer)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    start = {"model.path": "${base.model}"}
    own = {"name": "own", "play": {"recipe": "grpo.yaml", "episodes": 8}, "set": start}
    learn = {"name": "learn", "train": "archer.yaml", "set": start | {"data.traces.path": "${own.traces}"}}
    values = {
        "study": "agents",
        "output": "out",
        "seeds": 2,
        "shared": [{"name": "base", "train": "base.yaml"}],
        "arms": {"grpo": {"recipe": "grpo.yaml", "set": start}, "archer": {"stages": [own, learn]}},
        "evaluate": {"play": {"recipe": "grpo.yaml", "episodes": 6, "samples": 2}, "measure": "avg@2"},
        "budget": {"environment_steps": 64, "probe": 1},
    }

    def make(changes=None):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(values | (changes or {}), sort_keys=False))
        return load_study(path)

    return make


def test_arms_that_play_are_measured_by_episodes(study):
    made, found = study(), {}
    check_study(made)
    for arm in ("grpo", "archer"):
        cell = cell_of(made, "reported", arm, {}, 1)
        for each in (cell.needs, cell):
            each.folder.mkdir(parents=True, exist_ok=True)
            (each.folder / REQUEST).write_text(json.dumps(each.request.to_dict()))
            if not (each.folder / RESULT).exists():
                run_cell(each.folder)
        found[arm] = json.loads((cell.folder / RESULT).read_text())
    assert set(found["grpo"]["scores"]) == {"rooms-2", "rooms-3"}
    played = [json.loads(line) for line in (cell.folder / "own" / "episodes.jsonl").read_text().splitlines()]
    steps = sum(len(row["turns"]) - (row["stop"] == "cut") for row in played)
    assert found["archer"]["spent"]["environment_steps"] == steps > 0
    # GRPO acts as long as the budget lasts; ArCHer takes no step in training, and trains as its recipe says.
    assert found["archer"]["steps"] == 2 and 0 < found["grpo"]["spent"]["environment_steps"] <= 2 * 64
    assert found["archer"]["spent"]["flops"] > found["archer"]["bought"]["flops"] > 0


def played(recipe="grpo.yaml", episodes=6, measure="avg@1", **further):
    return {"play": {"recipe": recipe, "episodes": episodes, **further}, "measure": measure}


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (played(measure="greedy"), "no measure 'greedy' of episodes: avg@1"),
        (played() | {"samples": 4}, "samples: no effect beside `play`"),
        ({"measure": "avg@1"}, "give `benchmarks`, or `play`"),
        (played(episodes=9), "9 problems are to be played"),
        (played(recipe="archer.yaml"), "no environment to play in"),
        (played(agent="exprt"), "no agent 'exprt'"),
    ],
)
def test_what_is_refused(study, evaluate, message):
    with pytest.raises(PosttrainError, match=message):
        check_study(study({"evaluate": evaluate}))
