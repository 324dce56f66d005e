"""Shared fixtures: a tiny model folder, recipes for every method on it, and the test-data folder where there is one."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As for a command that a script starts in the background; tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
ALPHABET = "0123456789+=;#"

ONLINE = {
    "data": {"prompts": {"task": "chain_sum", "levels": [2, 3], "size": 64}},
    # A random model is never right, so the shaping term is what makes rewards differ.
    "verifier": [{"type": "procedural"}, {"type": "format", "pattern": ".*[0-4].", "weight": 0.5}],
    "verifier_pool": {"workers": 0},
    "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 10},
    "batch": {"prompts_per_step": 4, "micro_batch": 16},
}
PREFERENCE = {
    "data": {"preferences": {"chat": False, "others": {"gold": "gold"}}},
    "batch": {"rows_per_step": 16, "micro_batch": 16},
}
SUPERVISED = {
    "data": {"completions": {"task": "chain_sum", "levels": [2, 4], "size": 64}},
    "batch": {"rows_per_step": 16, "micro_batch": 16},
}


INIT = {
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "max_length": 96,
    "tokenizer": {"type": "characters", "alphabet": ALPHABET},
}
OFFLINE = {"data": {}, "batch": {"rows_per_step": 16, "micro_batch": 16}}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a character tokenizer."""
    from posttrain.config.schema import ModelConfig
    from posttrain.models.loading import load_policy

    folder = tmp_path_factory.mktemp("tiny") / "model"
    model, tokenizer = load_policy(ModelConfig(init=INIT), seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_causal() -> Any:
    """The module that builds a tiny model of any causal type."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("small_causal", ROOT / "tests" / "fixtures" / "small_causal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_preferences(path: Path) -> Path:
    """Rows with three scored responses and a value, so that every preference method finds what it reads."""
    from posttrain.config.schema import TaskSource
    from posttrain.data.tasks import generate_examples

    def traces(annotator: str, seed: int) -> list[Any]:
        source = TaskSource(task="chain_sum", levels=[2, 3], size=40, annotator=annotator, seed=seed)
        return generate_examples(source, "pairs")

    lines = []
    for number, example in enumerate(traces("expert", 0)):
        trace = example.completion
        row = {
            "prompt": example.problem.prompt,
            "gold": trace,
            "chosen": trace[:-1] + "0",
            "rejected": trace[:-3] + "#9",
        }
        scores = {"score_gold": 1.0, "score_chosen": 0.5 + number / 100, "score_rejected": 0.0}
        lines.append(json.dumps({**row, **scores, "value": 0.3}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_traces(path: Path) -> Path:
    """A trace file with verified right and wrong completions of the same problems."""
    from posttrain.config.schema import TaskSource
    from posttrain.data.tasks import generate_examples
    from posttrain.data.traces import Manifest, Trace, manifest_path

    source = TaskSource(task="chain_sum", levels=[2, 4], size=32)
    lines = []
    for example in generate_examples(source, "traces"):
        problem, right = example.problem, example.completion
        texts = {right: 1.0, right[:-1] + str((int(right[-1]) + 1) % 10): 0.0, f"{right[:3]};#0": 0.0}
        for sample, (text, outcome) in enumerate(texts.items()):
            verdict = "correct" if outcome else "wrong"
            lines.append(
                Trace(
                    problem.id,
                    sample,
                    problem.prompt,
                    text,
                    "test",
                    "m",
                    problem.reference,
                    dict(problem.meta),
                    verdict=verdict,
                    outcome=outcome,
                ).to_json()
            )
    manifest = Manifest(id="m", kind="taken in", policy={"label": "test"}, data={}, problems_hash="")
    manifest_path(path).write_text(json.dumps(asdict(manifest)), encoding="utf-8")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_policy(folder: Path) -> Path:
    """Another random policy with the same tokenizer."""
    from posttrain.config.schema import ModelConfig
    from posttrain.models.loading import load_policy

    for part in load_policy(ModelConfig(init=INIT), seed=1):
        part.save_pretrained(folder)
    return folder


def write_critic(tiny_model: Path, folder: Path) -> Path:
    """A value model with a random head."""
    import torch

    from posttrain.config.schema import ModelConfig
    from posttrain.models.loading import load_policy
    from posttrain.models.value import head_of, value_model

    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    classifier = value_model(model, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        head_of(classifier).weight.normal_(generator=torch.Generator().manual_seed(0))
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_recipe_data(
    tiny_model: Path, folder: Path, method: dict[str, Any], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A recipe as plain data that trains in a second or two; `changes` are by dotted key."""
    from posttrain.methods import METHODS

    cls = METHODS[method["name"]]
    needs = cls(cls.Config(**method)).needs
    shells = {"online": ONLINE, "sft": SUPERVISED, "preference": PREFERENCE, "reward": PREFERENCE, "offline": OFFLINE}
    base = shells[cls.shell]
    data: dict[str, Any] = {
        "model": {"path": str(tiny_model)},
        **yaml.safe_load(yaml.safe_dump(base)),
        "method": dict(method),
        "training": {"learning_rate": 1e-2, "max_steps": 3},
        "tracking": {"console": "plain", "plots": False},
        "output": str(folder / "run"),
        "threads": 1,
    }
    if needs.trains == "policy" and needs.critic:
        data["critic"] = {"path": str(write_critic(tiny_model, folder / "critic"))}
    for key in {"dpo_model", "guide_model"} & set(method):
        data["method"][key] = str(write_policy(folder / "guide"))
    if cls.shell == "offline":
        data["data"]["traces"] = {"path": str(write_traces(folder / "traces.jsonl")), "keep": "all"}
    elif "traces" in needs.data:
        data["data"]["traces"] = dict(data["data"]["prompts"])  # the expert's answers to the same problems
    if "preferences" in needs.data:
        data["data"]["preferences"]["path"] = str(write_preferences(folder / "preferences.jsonl"))
    if needs.samples:
        data["rollouts"] = {"max_new_tokens": 8}
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return data


@pytest.fixture(scope="session")
def offline_inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trace file with right and wrong completions, and a value model."""
    folder = tmp_path_factory.mktemp("offline")
    return write_traces(folder / "traces.jsonl"), write_critic(tiny_model, folder / "critic")


@pytest.fixture(scope="session", name="make_recipe_data")
def make_recipe_data_fixture():
    return make_recipe_data


@pytest.fixture
def write_recipe(tiny_model: Path, tmp_path: Path):
    """`write_recipe(method, changes)` -> a recipe file; see `make_recipe_data`."""

    def make(method: dict[str, Any], changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(make_recipe_data(tiny_model, tmp_path, method, changes)), encoding="utf-8")
        return path

    return make


@pytest.fixture
def load(write_recipe):
    """`load(method, changes)` -> a validated `Recipe`."""

    def make(method: dict[str, Any], changes: dict[str, Any] | None = None):
        from posttrain.config.loading import load_recipe
        from posttrain.methods import METHODS

        configs = {name: cls.Config for name, cls in METHODS.items()}
        return load_recipe(write_recipe(method, changes), [], configs)

    return make


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real benchmark files; skips where it is absent."""
    folder = Path(os.environ.get("POSTTRAIN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no folder of real data: set POSTTRAIN_TEST_DATA")
    return folder
