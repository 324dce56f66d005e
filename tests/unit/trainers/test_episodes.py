"""Episodes through the real online shell: what is trained on, what is refused, and a run that is killed."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from posttrain.cli.play import play_command
from posttrain.config.loading import load_recipe
from posttrain.config.schema import ModelConfig
from posttrain.errors import DataError, ModelError, NeedsError, RecipeError, WorldError
from posttrain.methods import CONFIGS
from posttrain.models.loading import load_policy
from posttrain.trainers.run import train

TEMPLATE = (
    "{% for m in messages %}{{ m.content + '<eos>' if m.role == 'assistant' else '<bos>' + m.content + '>' }}"
    "{% endfor %}"
)
SHOP = """
from posttrain.environments.base import Step

class Shop:
    def __init__(self, fail=False):
        self.fail = fail

    def reset(self, problem, seed):
        self.left = problem.meta["money"]
        if self.fail:
            raise OSError("closed today")
        return f"you have {self.left}"

    def step(self, action):
        self.left -= len(action)
        return Step(f"{self.left} left", reward=len(set(action)) / 10, done=self.left <= 0)
"""

GUESS = """
import verifiers as vf
from datasets import Dataset

class Guess(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [vf.UserMessage(content=f"not {len(messages[-1].content)}")]

def variety(completion, answer):
    return sum(len(set(one.content)) for one in completion if one.role == "assistant") / 10 + int(answer)

def load_environment():
    rows = Dataset.from_list([{"question": "guess", "answer": "0"}])
    return Guess(dataset=rows, rubric=vf.Rubric(funcs=[variety]))
"""


KILLS = """

import os, pathlib, signal

class Deadly(Shop):
    def __init__(self, count):
        super().__init__()
        self.count = pathlib.Path(count)

    def step(self, action):
        made = int(self.count.read_text()) + 1 if self.count.exists() else 1
        self.count.write_text(str(made))
        kill = self.count.with_name("kill")
        if kill.exists() and made == int(kill.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)
"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model without training that ends its turns, because every second token of its vocabulary stops it."""
    folder = tmp_path_factory.mktemp("talker")
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 256}
    model, tokenizer = load_policy(ModelConfig(init=init, chat_template=TEMPLATE), seed=0)
    stops = string.ascii_uppercase + "!#$%&()*+,-/:;=?@[]^_{|}~"
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(stops))]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, talker):
    """`recipe(name, changes)` -> file of a recipe of four episodes of two worlds a step."""

    def make(name: str, changes: dict | None = None) -> Path:
        data = {
            "model": {"path": str(talker)},
            "data": {"prompts": {"task": "rooms", "levels": [2, 3], "size": 12}},
            "environment": {"type": "rooms", "max_turns": 3, "episode_tokens": 256, "workers": 0, "shaped": True},
            "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 6},
            "method": {"name": "grpo"},
            "batch": {"prompts_per_step": 2, "micro_batch": 4},
            "training": {"learning_rate": 1e-3, "max_steps": 3, "save_steps": 1},
            "tracking": {"console": "off", "plots": False},
            "output": str(tmp_path / name),
        }
        for key, value in (changes or {}).items():
            *sections, last = key.split(".")
            inner = data
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(data))
        return file

    return make


@pytest.fixture
def shop(tmp_path):
    """What makes a recipe one of an environment of the user's own."""
    (tmp_path / "shop.py").write_text(SHOP)
    rows = [{"prompt": f"customer {n}", "money": 5 + n} for n in range(6)]
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {"type": "python", "factory": "shop.py:Shop", "max_turns": 3, "episode_tokens": 256, "workers": 1}
    return {"environment": environment, "data": {"prompts": {"path": str(tmp_path / "shop.jsonl")}}}


def run(file: Path, *overrides: str, **options):
    return train(load_recipe(file, list(overrides), CONFIGS), **options)


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "episode_turns" in row]


def test_an_environment_of_ones_own_trains(recipe, shop, tmp_path):
    run(recipe("shop", shop))
    rows = metrics(tmp_path / "shop")
    assert len({row["reward"] for row in rows}) > 1 and all(row["unknown_share"] == 0 for row in rows)
    for row in rows:
        assert 1 <= row["episode_turns"] <= 3 and row["engine_logp_diff_max"] < 1e-4
        assert sum(value for name, value in row.items() if name.startswith("stop/")) == pytest.approx(1)
    entry = json.loads((tmp_path / "shop" / "samples.jsonl").read_text().splitlines()[0])
    assert entry["prompt"].startswith("<bos>customer") and "you have" in entry["prompt"]
    # Actions and what stands between them in turn; only the actions have log-probs to learn from.
    assert "left>" in entry["turns"][1] and "left>" not in "".join(entry["turns"][::2])
    assert "completion" not in entry


RLOO = {"name": "grpo", "baseline": "leave_one_out", "scale_rewards": "none", "ratio": "trajectory"}


BY_TURNS = {"name": "grpo", "credit": "turn", "turn_discount": 0.9}


@pytest.mark.parametrize("method", [RLOO, BY_TURNS, {"name": "rec"}, {"name": "ppo", "kl_coef": 0.01, "epochs": 2}])
def test_other_methods_train_on_episodes(recipe, shop, talker, tmp_path, method):
    run(recipe("run", shop | {"method": method, "training.max_steps": 2}))
    before, after = (load_file(folder / "model.safetensors") for folder in (talker, tmp_path / "run" / "model"))
    assert any((before[name] != after[name]).any() for name in before)


TOOLS = """
def add(a: int, b: int) -> int:
    \"\"\"Add two numbers.

    Args:
        a: the first.
        b: the second.
    \"\"\"
    return a + b
"""


def test_tools_leave_the_judgement_of_the_last_reply_to_a_verifier(recipe, tmp_path):
    (tmp_path / "tools.py").write_text(TOOLS)
    changes = {
        "environment": {"type": "tools", "functions": ["tools.py:add"], "calls": "json"}
        | {"episode_tokens": 220, "workers": 0},
        "verifier": [{"type": "length", "max": 6, "unit": "tokens", "buffer": 5}],
        "verifier_pool": {"workers": 0},
        "rollouts.max_new_tokens": 6,
    }
    with pytest.raises(RecipeError, match="no verifier here judges"):
        run(recipe("shaping", changes))
    changes["verifier"].insert(0, {"type": "exact"})
    changes["data.prompts"] = {"path": str(tmp_path / "sums.jsonl"), "reference": "answer"}
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"prompt": "1 and {n}", "answer": "{n + 1}"}}\n' for n in range(6)))
    with pytest.raises(DataError, match="does not show the tool 'add'"):
        run(recipe("blind", changes))
    changes["model.chat_template"] = "{% if tools %}add{% endif %}" + TEMPLATE
    run(recipe("tools", changes))
    rows = metrics(tmp_path / "tools")
    # The policy cannot answer: what it is given is the word on its length, from 0 to 1.
    assert all(row["accuracy"] == 0 and 0 < row["reward"] < 1 for row in rows)
    assert all(row["stop/done"] + row.get("stop/cut", 0) == 1 and row["verify_seconds"] > 0 for row in rows)
    del changes["verifier"], changes["verifier_pool"]
    with pytest.raises(NeedsError, match="needs `verifier`"):
        run(recipe("unjudged", changes))


def test_each_turn_is_compared_with_the_others_of_its_number(recipe, shop, tmp_path):
    """What is written for people is what the objective gives, by hand from the rewards of the first group."""
    run(recipe("turns", shop | {"method": BY_TURNS | {"scale_rewards": "none"}, "training.max_steps": 1}))
    lines = (tmp_path / "turns" / "samples.jsonl").read_text().splitlines()
    group = [entry for entry in map(json.loads, lines) if entry["step"] == 0]
    assert len(group) == 4 and len({tuple(entry["advantage"]) for entry in group}) > 1
    width = len(group[0]["advantage"])
    for turn in range(width):
        assert sum(entry["advantage"][turn] for entry in group) == pytest.approx(0, abs=1e-5)
    actions = [len(entry.get("turns", ["one"])[::2]) for entry in group]
    for entry, number in zip(group, actions, strict=True):
        assert not any(entry["advantage"][number:])
    with pytest.raises(NeedsError, match="credits single turns"):
        changes = {"method": BY_TURNS, "environment": None, "verifier": [{"type": "procedural"}]}
        run(recipe("alone", changes))
    with pytest.raises(RecipeError, match="turn_discount has no effect"):
        run(recipe("idle", {"method": {"name": "grpo", "turn_discount": 0.5}}))
    with pytest.raises(RecipeError, match="about whole completions"):
        run(recipe("whole", {"method": {"name": "grpo", "credit": "turn", "ratio": "sequence"}}))


def test_a_run_that_is_killed_within_an_episode_ends_as_one_that_was_not(recipe, killed_at, tmp_path):
    """SIGKILL at the 25th token that is drawn: in the second rollout, between the turns of its episodes."""
    changes = {"environment.noise": 0.3}
    run(recipe("whole", changes))
    broken = recipe("broken", changes)
    killed_at(("token", 25), broken)
    saved = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir())
    assert saved == ["checkpoint-1"]
    run(broken, resume="auto")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "broken")]
    assert samples[0] == samples[1]


def test_a_run_whose_environments_are_in_this_process_is_killed_within_a_step_of_one(recipe, shop, killed_at, tmp_path):
    """SIGKILL from inside the environment, in its eighth action: in the second rollout. Other runs are as long."""
    (tmp_path / "shop.py").write_text(SHOP + KILLS)
    shop["environment"] |= {"workers": 0, "factory": "shop.py:Deadly", "options": {"count": str(tmp_path / "count")}}
    run(recipe("whole", shop))
    total = int((tmp_path / "count").read_text())
    (tmp_path / "count").write_text("0")
    (tmp_path / "kill").write_text(str(total // 2))
    broken = recipe("broken", shop)
    killed_at(None, broken)
    (tmp_path / "kill").unlink()
    run(broken, resume="auto")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "broken")]
    assert samples[0] == samples[1]


def test_episodes_are_played_between_steps_and_change_nothing(recipe, tmp_path):
    run(recipe("alone", {"training.max_steps": 2}))
    evaluation = {"every": 1, "episodes": {"prompts": {"task": "rooms", "levels": [2], "size": 5, "split": "test"}}}
    run(recipe("played", {"training.max_steps": 2, "evaluation": evaluation}))
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "played")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    files = sorted((tmp_path / "played" / "evaluation").glob("episodes-*.jsonl"))
    assert [file.name for file in files] == [f"episodes-{step:06d}.jsonl" for step in (0, 1, 2)]
    rows = [json.loads(line) for line in (tmp_path / "played" / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "eval/episodes/solved" in row]
    episodes = [[json.loads(line) for line in file.open()] for file in files]
    for row, group in zip(found, episodes, strict=True):
        assert row["eval/episodes/solved"] == sum(one["outcome"] for one in group) / 5
        assert row["eval/episodes/turns"] == pytest.approx(sum(len(one["turns"]) for one in group) / 5)
    with pytest.raises(NeedsError, match="no environment to play episodes in"):
        changes = {"environment": None, "verifier": [{"type": "procedural"}], "evaluation": evaluation}
        run(recipe("nowhere", changes))


def test_groups_without_a_difference_are_replaced_on_one_rank_and_on_two(recipe, shop, on_two_ranks, tmp_path):
    """Dynamic sampling over episodes; the environment's rewards differ from one action to the next, seldom."""
    (tmp_path / "shop.py").write_text(SHOP.replace("len(set(action)) / 10", "float(len(action) > 4)"))
    changes = shop | {"rollouts.refill": {"waves": 4}, "training.max_steps": 2}
    run(recipe("one", changes))
    rows = metrics(tmp_path / "one")
    assert all(row["refill/draws"] >= 2 for row in rows) and any(row["refill/draws"] > 2 for row in rows)
    two = recipe("two", changes | {"batch.micro_batch": 2})
    on_two_ranks(two)
    for single, double in zip(rows, metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "refill/draws", "episode_turns", "stop/done", "loss"):
            assert double.get(name) == pytest.approx(single.get(name), rel=1e-3, abs=1e-5), name


def test_an_environment_of_an_installed_package(recipe, tmp_path):
    pytest.importorskip("gymnasium")
    rows = [{"prompt": "walk to G", "desc": [f"S{place}F", "HFH", "HFG"]} for place in "FFFF"]
    (tmp_path / "lakes.jsonl").write_text("".join(json.dumps(row | {"row": n}) + "\n" for n, row in enumerate(rows)))
    lake = {"type": "gymnasium", "id": "FrozenLake-v1", "columns": ["desc"], "actions": ["left", "down", "right", "up"]}
    changes = {
        "environment": lake | {"options": {"is_slippery": False}, "max_turns": 3, "episode_tokens": 256},
        "data.prompts": {"path": str(tmp_path / "lakes.jsonl")},
        "training.max_steps": 2,
        # Capitals end the turns of the other model, and are places on the map.
        "model": {"init": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 256}, "chat_template": TEMPLATE},
    }
    run(recipe("lake", changes))
    assert all(row["unknown_share"] == 0 and row["episode_turns"] >= 1 for row in metrics(tmp_path / "lake"))


def test_an_environment_of_verifiers(recipe, tmp_path):
    pytest.importorskip("verifiers")
    (tmp_path / "game.py").write_text(GUESS)
    rows = [{"prompt": [{"role": "user", "content": f"guess {n}"}], "answer": str(n)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {"type": "verifiers", "factory": "game.py:load_environment", "max_turns": 3, "episode_tokens": 256}
    changes = {"environment": environment, "data.prompts": {"path": str(tmp_path / "rows.jsonl"), "prompt": "prompt"}}
    run(recipe("guess", changes | {"training.max_steps": 2}))
    found = metrics(tmp_path / "guess")
    assert len(found) == 2 and len({row["reward"] for row in found}) == 2
    assert all(row["unknown_share"] == 0 and row["episode_turns"] > 1 for row in found)


def test_failures_are_unknown_and_many_of_them_end_the_run(recipe, shop, tmp_path):
    run(recipe("some", {"environment.crash": 0.3, "environment.max_unknown_share": 1.0, "training.max_steps": 2}))
    rows = metrics(tmp_path / "some")
    failed = sum(row.get("stop/crash", 0) for row in rows)
    assert failed > 0 and failed == sum(row["unknown_share"] for row in rows)
    assert failed == sum(row.get("verdict/crash", 0) for row in rows)
    shop["environment"]["options"] = {"fail": True}
    with pytest.raises(WorldError, match="failed in 8 of 8 episodes") as ended:
        run(recipe("all", shop))
    assert "closed today" in ended.value.hint


def test_what_cannot_be_is_refused_before_anything_is_loaded(recipe):
    exact = [{"type": "exact"}]
    for changes, error, words in (
        ({"verifier": exact}, NeedsError, "the environment rewards"),
        ({"environment.episode_tokens": 512}, NeedsError, "reads at most 256"),
        ({"model": {"init": {"hidden_size": 16, "layers": 1}}}, ModelError, "no chat template"),
        ({"method": {"name": "sft"}}, RecipeError, "plays no episodes"),
        ({"environment.type": "room"}, RecipeError, "rooms"),
        ({"environment.turns": 3}, RecipeError, "max_turns"),
        ({"environment": {"type": "python", "factory": "nowhere.py:Shop"}}, RecipeError, "nowhere.py"),
    ):
        with pytest.raises(error) as refused:
            run(recipe("refused", changes))
        assert words in str(refused.value)


ROLLOUTS = {"samples_per_prompt": 2, "max_new_tokens": 6}
PREFIXED = {"name": "prefixrl", "boundary": "turn", "prefixed_share": 1.0, "fraction_low": 0.3, "fraction_high": 0.7}


@pytest.fixture
def recorded(recipe, tmp_path):
    """A file of episodes of the recipe's own problems, by the expert."""
    path = tmp_path / "expert.jsonl"
    play_command(recipe("played", {"environment.max_turns": 8}), [], "expert", 12, greedy=False, out=path)
    return {"traces": {"path": str(path), "keep": "all"}}, path


def behind(recorded, method, **more):
    prompts = {"task": "rooms", "levels": [2, 3], "size": 12}
    environment = {"type": "rooms", "max_turns": 8, "episode_tokens": 256, "workers": 0, "shaped": True}
    return {
        "method": method,
        "data": {"prompts": prompts, **recorded[0]},
        "environment": environment,
        "rollouts": ROLLOUTS,
        "training.max_steps": 2,
    } | more


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (PREFIXED, "prefix"),
        (PREFIXED | {"cuts_per_problem": None, "credit": "turn"}, "prefix"),
        ({"name": "drpo", "boundary": "turn"}, "reset"),
    ],
)
def test_a_policy_is_trained_behind_recorded_turns(recipe, recorded, talker, tmp_path, method, kind):
    run(recipe("run", behind(recorded, method)))
    rows = metrics(tmp_path / "run")
    assert all(row[f"completion_length/{kind}"] > 0 and row["prefix_length"] > 0 for row in rows)
    assert all(row["unknown_share"] == 0 and row["engine_logp_diff_max"] < 1e-4 for row in rows)
    entries = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    actions = {turn["action"] for line in recorded[1].open() for turn in json.loads(line)["turns"]}
    begun = [entry for entry in entries if entry.get("prefix")]
    assert begun and all(any(action in entry["prefix"] for action in actions) for entry in begun)


def test_experts_beside_episodes_and_offline_by_turns(recipe, recorded, talker, tmp_path):
    method = {"name": "chord", "expert_rows_per_step": 2}
    run(recipe("chord", behind(recorded, method)))
    assert all(row["expert/nll"] > 0 for row in metrics(tmp_path / "chord"))
    offline = {
        "method": {"name": "oreo", "level": "turn", "kl_reg": 0.0, "balance": None},
        "data": recorded[0],
        "environment": None,
        "rollouts": None,
        "batch": {"rows_per_step": 4, "micro_batch": 4},
        "training.max_steps": 2,
    }
    run(recipe("oreo", offline))
    before, after = (load_file(folder / "model.safetensors") for folder in (talker, tmp_path / "oreo" / "model"))
    assert any((before[name] != after[name]).any() for name in before)


def test_what_does_not_fit_is_refused(recipe, recorded, tmp_path):
    with pytest.raises(NeedsError, match="boundary: turn"):
        run(recipe("tokens", behind(recorded, {"name": "drpo"})))
    with pytest.raises(NeedsError, match="no environment to do so"):
        alone = behind(recorded, PREFIXED, environment=None, verifier=[{"type": "procedural"}])
        run(recipe("alone", alone))
    with pytest.raises(RecipeError, match="answer_pattern has no effect"):
        run(recipe("pattern", behind(recorded, PREFIXED | {"answer_pattern": "x"})))
    other = behind(recorded, PREFIXED)
    other["environment"] |= {"shaped": False}
    with pytest.raises(WorldError, match="failed in 4 of 4 episodes") as ended:
        run(recipe("other", other))
    assert "diverged: turn" in ended.value.hint
    texts = ({"traces": {"task": "rooms", "levels": [2], "size": 4, "annotator": "expert"}}, None)
    with pytest.raises(DataError, match="is no episode"):
        run(recipe("texts", behind(texts, PREFIXED)))


GRADES = """
def grade(action, expected):
    return 1.0 if action == expected else len(set(action) & set(expected)) / 40
"""


def along(recorded, patches):
    """A recipe in which the recorded episodes are the environment."""
    changed = behind(recorded, {"name": "ui_s1", "filter_std": 0.0})
    del changed["data"]["traces"]
    recording = {"type": "recorded", "path": str(recorded[1]), "patches": patches, "workers": 0}
    return changed | {"environment": recording | {"max_turns": 8, "episode_tokens": 256}}


def test_semi_online_training_along_an_expert(recipe, recorded, talker, tmp_path):
    """The untrained policy is never right: each of its actions is patched, and ends a row of its own."""
    (tmp_path / "grades.py").write_text(GRADES)
    changes = along(recorded, None)
    changes["environment"]["grade"] = "grades.py:grade"
    run(recipe("patched", changes))
    rows = metrics(tmp_path / "patched")
    turns = [len(json.loads(line)["turns"]) for line in recorded[1].open()]
    assert all(min(turns) <= row["episode_turns"] <= max(turns) for row in rows)
    assert all(0.1 < row["reward"] / row["episode_turns"] < 0.4 and row["accuracy"] == 0 for row in rows)
    assert all(row["engine_logp_diff_max"] < 1e-4 and row["unknown_share"] == 0 for row in rows)
    before, after = (load_file(folder / "model.safetensors") for folder in (talker, tmp_path / "patched" / "model"))
    assert any((before[name] != after[name]).any() for name in before)
    with pytest.raises(NeedsError, match="patches make several of one"):
        run(recipe("grpo", along(recorded, None) | {"method": {"name": "grpo"}}))
    with pytest.raises(DataError, match="have no recorded episode"):
        other = along(recorded, 1)
        other["data"]["prompts"] = {"task": "rooms", "levels": [4], "size": 4}
        run(recipe("other", other))


def test_how_far_a_policy_follows_an_expert(recipe, recorded, tmp_path, capsys):
    file = recipe("sop", along(recorded, 0))
    play_command(file, [], "expert", 12, greedy=False, out=tmp_path / "again.jsonl")
    assert "progress 1.000, without an error 1.000, score 1.000" in capsys.readouterr().out
    play_command(file, [], "weak", 12, greedy=False, out=None)
    found = capsys.readouterr().out.rsplit("progress ", 1)[1]
    assert 0 < float(found[:5]) < 1
