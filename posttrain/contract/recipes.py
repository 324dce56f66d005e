"""A recipe that trains a tiny model in a second or two, for any method: by its shell and its needs alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from posttrain.config.relative_paths import holds_a_model
from posttrain.config.schema import ModelConfig, Section, TaskSource
from posttrain.contract.batches import ROLES, responses_taken
from posttrain.data.episodes import Episode, Stop, Turn
from posttrain.data.sample import Example
from posttrain.data.tasks import generate_examples
from posttrain.data.traces import Manifest, Trace, manifest_path
from posttrain.environments.base import Step
from posttrain.methods import METHODS
from posttrain.methods.base import PreferenceMethod
from posttrain.models.loading import load_policy
from posttrain.models.value import head_of, value_model

INIT = {
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "max_length": 96,
    "tokenizer": {"type": "characters", "alphabet": "0123456789+=;#"},
}
"""A random two-layer Llama with a character tokenizer."""

TEMPLATE = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '=') }}{% endfor %}"
LEVELS, SIZE = [2, 3], 64
TASK = {"task": "chain_sum", "levels": LEVELS, "size": SIZE}

ONLINE: dict[str, Any] = {
    "data": {"prompts": TASK},
    # A random model is never right, so the shaping term is what makes rewards differ.
    "verifier": [{"type": "procedural"}, {"type": "format", "pattern": ".*[0-4].", "weight": 0.5}],
    "verifier_pool": {"workers": 0},
    "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 10},
    "batch": {"prompts_per_step": 4, "micro_batch": 16},
}
PREFERENCE: dict[str, Any] = {
    "data": {"preferences": {"chat": False}},
    "batch": {"rows_per_step": 16, "micro_batch": 16},
}
SUPERVISED: dict[str, Any] = {
    "data": {"completions": TASK | {"levels": [2, 4]}},
    "batch": {"rows_per_step": 16, "micro_batch": 16},
}
OFFLINE: dict[str, Any] = {"data": {}, "batch": {"rows_per_step": 16, "micro_batch": 16}}
SHELLS = {"online": ONLINE, "sft": SUPERVISED, "preference": PREFERENCE, "reward": PREFERENCE, "offline": OFFLINE}


def tiny_recipe(
    method: Mapping[str, Any], folder: Path, model: Path, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A recipe as plain data; what it needs is written into `folder`.

    Args:
        method: its section. Models that it names are replaced by one that is made here; those it must name may be left
            out.
        folder: for data and further models; the run's folder is `run` in it.
        model: the policy to start from, as `write_model` makes it.
        changes: by dotted key.
    """
    cls = METHODS[method["name"]]
    section = dict(method) | _models(cls.Config, method, folder)
    made = cls(cls.Config(**section))
    needs = made.needs
    data: dict[str, Any] = {
        "model": {"path": str(model)},
        **copy.deepcopy(SHELLS[cls.shell]),
        "method": section,
        "training": {"learning_rate": 1e-2, "max_steps": 3},
        "tracking": {"console": "plain", "plots": False},
        "output": str(folder / "run"),
        "threads": 1,
    }
    if needs.turns:
        data["model"]["chat_template"] = TEMPLATE
        episodes = str(write_episodes(folder / "episodes.jsonl"))
        data["environment"] = {
            "type": "recorded",
            "path": episodes,
            "patches": None,
            "workers": 0,
            "episode_tokens": 96,
        }
    if not needs.verifier or needs.turns:
        data = {key: value for key, value in data.items() if not key.startswith("verifier")}
    if needs.trains == "policy" and needs.critic:
        data["critic"] = {"path": str(write_critic(folder / "critic", model))}
    if cls.shell == "offline":
        data["data"]["traces"] = {"path": str(write_traces(folder / "traces.jsonl")), "keep": "all"}
    elif "traces" in needs.data:
        data["data"]["traces"] = dict(data["data"]["prompts"])  # the expert's answers to the same problems
        if not needs.expert_rows:  # and wrong ones, with outcomes
            path = write_traces(folder / "traces.jsonl", LEVELS, SIZE, "prompts")
            data["data"]["traces"] = {"path": str(path), "keep": "all"}
    if needs.data == ("stepwise",):
        data["data"] = {"stepwise": {"path": str(write_stepwise(folder / "stepwise.jsonl")), "chat": False}}
    elif needs.data == ("unpaired",):
        data["data"] = {"unpaired": {"path": str(write_unpaired(folder / "unpaired.jsonl")), "chat": False}}
    elif isinstance(made, PreferenceMethod):
        responses = responses_taken(made, 3)
        path = write_preferences(folder / "preferences.jsonl", responses, made.columns)
        others = {role: role for role in ROLES[2:responses]}
        data["data"]["preferences"] |= {"path": str(path)} | ({"others": others} if others else {})
    if needs.samples:
        data["rollouts"] = {"max_new_tokens": 8}
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        inner = data
        for part in sections:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return data


def write_episodes(path: Path) -> Path:
    """The expert's answers to the problems of ONLINE as episodes, an addition each turn."""
    lines = []
    for example in _traces(LEVELS, SIZE, "prompts"):
        problem, actions = example.problem, str(example.completion).split(";")
        turns = [Turn(action, Step("+", done=action is actions[-1])) for action in actions]
        prompt = ({"role": "user", "content": str(problem.prompt)},)
        episode = Episode(problem, 0, 0, prompt=prompt, turns=turns, stop=Stop.DONE)
        lines.append(json.dumps(episode.row()) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_model(folder: Path, seed: int = 0) -> Path:
    """A folder with random weights and the tokenizer."""
    for part in load_policy(ModelConfig.model_validate({"init": INIT}), seed=seed):
        part.save_pretrained(folder)
    return folder


def write_critic(folder: Path, model: Path) -> Path:
    """A value model of a policy, with a random head."""
    policy, tokenizer = load_policy(ModelConfig(path=str(model)), seed=0)
    critic = value_model(policy, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        head_of(critic).weight.normal_(generator=torch.Generator().manual_seed(0))
    for part in (critic, tokenizer):
        part.save_pretrained(folder)
    return folder


def write_preferences(path: Path, responses: int = 3, columns: Mapping[str, Any] | None = None) -> Path:
    """Rows with that many scored responses, and further columns with the same value in each row."""
    lines = []
    for number, example in enumerate(_traces([2, 3], 40, "pairs")):
        trace = str(example.completion)
        texts = dict(zip(ROLES, [trace[:-1] + "0", trace[:-3] + "#9", trace], strict=False))
        scores = dict(zip(ROLES, [0.5 + number / 100, 0.0, 1.0], strict=False))
        for further, role in enumerate(ROLES[3:responses]):
            texts[role], scores[role] = trace[: further + 2] + "#7", 0.2 + further / 10
        row = {"prompt": example.problem.prompt, **{role: texts[role] for role in ROLES[:responses]}}
        row |= {f"score_{role}": scores[role] for role in ROLES[:responses]} | dict(columns or {})
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_unpaired(path: Path) -> Path:
    """Rows with one completion, good or bad."""
    lines = []
    for number, example in enumerate(_traces([2, 3], 40, "unpaired")):
        trace, good = str(example.completion), number % 3 > 0
        row = {"prompt": example.problem.prompt, "completion": trace if good else trace[:-1] + "0", "label": good}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_stepwise(path: Path) -> Path:
    """Rows with a solution in steps, in every third of them the last one wrong."""
    lines = []
    for number, example in enumerate(_traces([2, 4], 40, "stepwise")):
        steps = str(example.completion).split(";")
        labels = [True] * (len(steps) - 1) + [number % 3 > 0]
        steps[-1] = steps[-1] if labels[-1] else steps[-1][:-1] + "0"
        lines.append(json.dumps({"prompt": example.problem.prompt, "completions": steps, "labels": labels}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_traces(path: Path, levels: Sequence[int] = (2, 4), size: int = 32, name: str = "traces") -> Path:
    """A trace file with verified right and wrong completions of the same problems."""
    lines = []
    for example in _traces(list(levels), size, name):
        problem, right = example.problem, str(example.completion)
        texts = {right: 1.0, right[:-1] + str((int(right[-1]) + 1) % 10): 0.0, f"{right[:3]};#0": 0.0}
        for sample, (text, outcome) in enumerate(texts.items()):
            trace = Trace(
                problem.id,
                sample,
                str(problem.prompt),
                text,
                "test",
                "m",
                problem.reference or "",
                dict(problem.meta),
                verdict="correct" if outcome else "wrong",
                outcome=outcome,
            )
            lines.append(trace.to_json())
    manifest = Manifest(id="m", kind="taken in", policy={"label": "test"}, data={}, problems_hash="")
    manifest_path(path).write_text(json.dumps(asdict(manifest)), encoding="utf-8")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _traces(levels: list[int], size: int, name: str) -> list[Example]:
    return generate_examples(TaskSource(task="chain_sum", levels=levels, size=size), name)


def _models(config: Any, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The parameters that name a further model, with one that is made here: those given, and those that must be; and
    those of sections within it."""
    found: dict[str, Any] = {}
    for name, info in config.model_fields.items():
        inner = [each for each in get_args(info.annotation) if isinstance(each, type) and issubclass(each, Section)]
        if holds_a_model(info) and (info.is_required() or given.get(name) is not None):
            found[name] = str(write_model(folder / name, seed=1))
        elif inner and isinstance(given.get(name), Mapping):
            found[name] = dict(given[name]) | _models(inner[0], given[name], folder / name)
    return found
