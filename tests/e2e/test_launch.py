"""`accelerate launch` on two CPU ranks trains the model that one rank trains: DDP, FSDP2, ZeRO-1, -2, -3 and
offloading, with real processes. What is evaluated on the way and what is saved is the same too. And a killed rank.

One launch per strategy, with its file of launch/accelerate, trains all recipes one after the other. Under ZeRO-3 small
tensors are sharded too (threshold 0), which it would leave whole in a model of this size.
"""

import importlib.util
import json
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.config.loading import load_recipe
from posttrain.config.schema import ModelConfig
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.state.checkpoint import commit, complete_checkpoints, read_state
from posttrain.state.signature import unpickled
from posttrain.trainers.run import train

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "contracts"
pytestmark = pytest.mark.slow

# Plain gradient descent: Adam would blow the rounding of tiny gradients up to the size of its step.
DESCENT = {"training.optim": "sgd", "training.learning_rate": 0.5, "training.max_grad_norm": 0.0}
LORA = {"model.peft": {"type": "lora", "r": 4}}
BENCHMARK = {
    "name": "sums",
    "data": {"task": "chain_sum", "levels": [2], "size": 4, "split": "test"},
    "verifier": [{"type": "procedural"}, {"type": "format", "pattern": ".*[0-4].", "weight": 0.5}],
}
EVALUATED = {"every": 2, "samples": 2, "max_new_tokens": 6}
HELD_OUT = {"evaluation": EVALUATED | {"preferences": {"share": 0.2, "kl_prompts": 4, "kl_samples": 2}}}
CASES = {
    "sft": ({"name": "sft"}, {"evaluation": EVALUATED | {"benchmarks": [BENCHMARK]}}),
    "dpo": ({"name": "dpo"}, HELD_OUT),  # the start is the reference
    "dpo-lora": ({"name": "dpo"}, LORA | HELD_OUT),  # the policy without its adapter
    "simpo": ({"name": "simpo"}, HELD_OUT),  # a copy
    "hypo": ({"name": "hypo", "lam": 0.05}, {}),
    "grpo": ({"name": "grpo", "beta": 0.1}, {"evaluation": EVALUATED | {"benchmarks": [BENCHMARK]}}),
    "grpo-lora": ({"name": "grpo"}, LORA),
    # Four completions on each rank, which end at different lengths: one rank samples for longer than the other.
    "grpo-uneven": (
        {"name": "grpo"},
        {"batch.prompts_per_step": 4, "rollouts.samples_per_prompt": 2, "rollouts.max_new_tokens": 40},
    ),
    "chord": ({"name": "chord", "expert_rows_per_step": 6, "mu_warmup_steps": 1, "mu_decay_steps": 4}, {}),
    "prefixrl": ({"name": "prefixrl", "answer_pattern": "#"}, {}),
    "oreo": (
        {"name": "oreo", "level": "step", "delimiter": ";", "actor_freeze_steps": 1},
        {"training.learning_rate": 0.05},
    ),
    "drpo": ({"name": "drpo", "epochs": 1, "reset_share": 0.5}, {"training.learning_rate": 0.1}),
    "ppo": ({"name": "ppo", "epochs": 2, "kl_target": 0.5}, {"training.learning_rate": 0.1}),
    "ppo-lora": ({"name": "ppo", "epochs": 1}, LORA | {"training.learning_rate": 0.1}),
    "rlgf": (  # two value heads, of which each rollout has one
        {"name": "rlgf", "variant": "lols", "ppo_pp_share": 0.5, "guide_model": "GUIDE", "epochs": 1},
        {"training.learning_rate": 0.1},
    ),
    "reward": ({"name": "reward", "center_rewards_coefficient": 0.1}, {}),
}
if importlib.util.find_spec("vllm") is not None:  # every rank with an engine of its own
    CASES |= {
        "grpo-vllm": ({"name": "grpo"}, {"rollouts.engine": "vllm"}),
        "grpo-vllm-lora": ({"name": "grpo"}, {"rollouts.engine": "vllm"} | LORA),
        "hypo-vllm": ({"name": "hypo", "lam": 0.05}, {"rollouts.engine": "vllm"} | HELD_OUT),
        "grpo-server": (  # one for all ranks, to which the main one sends what all of them gather
            {"name": "grpo"},
            {"rollouts.engine": "vllm", "rollouts.mode": "server", "rollouts.vllm": {"api_key_env": "SERVER_KEY"}},
        ),
    }
WHOLE = tuple(CASES)
STRATEGIES = {
    "cpu": WHOLE,
    "zero1": ("sft", "dpo", "grpo", "oreo", "drpo", "reward"),
    "zero2": WHOLE,
    "zero3": WHOLE,
    "zero3_offload": ("sft", "dpo", "grpo", "oreo", "drpo", "ppo-lora", "reward"),
    "fsdp2": WHOLE,
}
RESUMED = ("grpo", "drpo")
CLOCK = (
    "time",
    "step_seconds",
    "rollout_seconds",
    "verify_seconds",
    "sync_seconds",
    "tokens_per_second",
    "wall_seconds",
    "cpu_seconds",
    "cpu_seconds_total",
)
ROUNDING = ("canary_logp_diff_max", "engine_logp_diff_max", "engine_logp_diff_mean")


def recipe_changes(changes, out, model):
    changes = {**DESCENT, **changes, "batch.micro_batch": 4, "training.save_steps": 2, "output": str(out)}
    return changes | {"model.path": str(model)} if "rollouts.engine" in changes else changes


def command(folder, strategy, *arguments, as_shipped=False):
    """`accelerate launch` on two ranks with the settings of launch/accelerate."""
    config = yaml.safe_load((ROOT / "launch" / "accelerate" / f"{strategy}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2}
    if strategy.startswith("zero") and not as_shipped:
        config |= {"deepspeed_config": deepspeed_config(folder, config["deepspeed_config"])}
        del config["mixed_precision"]  # accelerate refuses it beside a DeepSpeed file
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    return [*launcher, "--main_process_port", str(port), *map(str, arguments)]


def deepspeed_config(folder, shipped):
    """The same for gradient descent instead of Adam, and with every tensor sharded."""
    zero = {
        "stage": shipped["zero_stage"],
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": shipped["offload_optimizer_device"]},
        "offload_param": {"device": shipped["offload_param_device"]},
    }
    settings = {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},  # by the recipe's training.bf16
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    return {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": False}


def try_to_launch(folder, strategy, *arguments, as_shipped=False, **environment):
    return subprocess.run(
        command(folder, strategy, *arguments, as_shipped=as_shipped),
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def launch(folder, strategy, *arguments, **settings):
    done = try_to_launch(folder, strategy, *arguments, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def sharded(write_case, tmp_path_factory):
    """`sharded(strategy)` -> name -> run folder, all trained by one launch."""
    known = {}

    def runs(strategy):
        needs_deepspeed(strategy)
        if strategy not in known:
            known[strategy] = None
            folder = tmp_path_factory.mktemp(strategy)
            recipes = [write_case(folder, name) for name in STRATEGIES[strategy]]
            launch(folder, strategy, SCRIPTS / "train_recipes.py", *recipes)
            known[strategy] = {name: folder / name for name in STRATEGIES[strategy]}
        assert known[strategy] is not None, "this launch failed in a test before"
        return known[strategy]

    return runs


def needs_deepspeed(strategy):
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


@pytest.fixture(scope="module")
def server_url(vllm_model, tmp_path_factory):
    """`server_url()` -> address of a vLLM server, which starts when it is first asked for."""
    given = runpy.run_path(str(Path(__file__).with_name("test_vllm_server.py")))
    started = []

    def url():
        if not started:
            started.append(given["Server"](vllm_model, tmp_path_factory.mktemp("server")).wait())
            os.environ["SERVER_KEY"] = given["KEY"]
        return started[0].url

    yield url
    for server in started:
        server.end()
        del os.environ["SERVER_KEY"]


@pytest.fixture(scope="module")
def write_case(tiny_model, vllm_model, server_url, make_recipe_data):
    """`write_case(folder, name, changes)` -> recipe file of a case; the run's folder stands beside it."""

    def write(folder, name, changes=None):
        method, its_own = CASES[name]
        changes = recipe_changes(its_own, folder / name, vllm_model) | (changes or {})
        if changes.get("rollouts.mode") == "server":
            changes["rollouts.vllm"] = {**changes["rollouts.vllm"], "url": server_url()}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(make_recipe_data(tiny_model, folder, method, changes)))
        return path

    return write


def train_here(path):
    return train(load_recipe(path, [], {name: cls.Config for name, cls in METHODS.items()})).run_dir


@pytest.fixture(scope="module")
def alone(write_case, tmp_path_factory):
    """`alone(name)` -> run folder of a case on one rank."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = train_here(write_case(tmp_path_factory.mktemp("alone"), name))
        return known[name]

    return run


def weights(run, folder="model"):
    return load_file(run / folder / "model.safetensors")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


def assert_same_training(single, double):
    """Weights and everything logged agree up to the rounding of float32."""
    ours, theirs = weights(double), weights(single)
    if "lm_head.weight" in ours.keys() - theirs.keys():  # a tied head, which ZeRO-1 and -2 write twice
        assert torch.equal(ours.pop("lm_head.weight"), ours["model.embed_tokens.weight"])
    assert largest_difference(ours, theirs) < 2e-5
    assert (single / "critic").exists() == (double / "critic").exists()
    if (single / "critic").exists():
        assert largest_difference(weights(double, "critic"), weights(single, "critic")) < 2e-5
    for one, two in zip(lines(single), lines(double), strict=True):
        assert set(one) == set(two)
        for key in set(one) - set(CLOCK) - set(ROUNDING):
            assert two[key] == (
                one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=1e-3, abs=1e-5)
            ), key
        assert all(two.get(key, 0.0) < 1e-5 for key in ROUNDING)


EACH = pytest.mark.parametrize(("strategy", "name"), [(s, n) for s, names in STRATEGIES.items() for n in names])


@EACH
def test_two_ranks_train_the_model_of_one(sharded, strategy, name, alone):
    double = sharded(strategy)[name]
    assert_same_training(alone(name), double)
    assert len([line for line in lines(double) if "loss" in line]) == 3
    evaluation = CASES[name][1].get("evaluation", {})
    found = {key.split("/")[0] for line in lines(double) for key in line if "/" in key}
    assert ("preferences" in evaluation) == ("held_out" in found)
    assert ("benchmarks" in evaluation) == ("eval" in found)


@EACH
def test_what_is_saved_is_a_whole_hugging_face_model(sharded, strategy, name):
    run = sharded(strategy)[name]
    classifier = METHODS[CASES[name][0]["name"]].shell == "reward"
    folders = {"model": AutoModelForSequenceClassification if classifier else AutoModelForCausalLM}
    if (run / "critic").exists():
        folders["critic"] = AutoModelForSequenceClassification
    for folder, kind in folders.items():
        model, info = kind.from_pretrained(run / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(parameter.numel() for parameter in model.parameters())


@pytest.mark.serve
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_a_few_on_two_ranks(strategy, write_case, alone, tmp_path):
    """What `make test-serve` runs of the above: held-out pairs and a reference; rollouts of uneven length; a critic."""
    needs_deepspeed(strategy)
    names = ("dpo", "grpo-uneven", "drpo")
    launch(tmp_path, strategy, SCRIPTS / "train_recipes.py", *(write_case(tmp_path, name) for name in names))
    for name in names:
        assert_same_training(alone(name), tmp_path / name)


LARGER = {
    "hidden_size": 128,
    "layers": 4,
    "heads": 4,
    "max_length": 96,
    "tokenizer": {"type": "characters", "alphabet": "0123456789+=;#"},
}
LOADED = {"sft": ({}, 1), "dpo": ({}, 2), "dpo-lora": (LORA, 1)}
"""Changes, and how many models are taken apart before the first step: `dpo` has a reference."""


@pytest.mark.serve
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_one_rank_reads_the_weights(strategy, tiny_model, make_recipe_data, tmp_path):
    """The other one never holds more than its part and two tensors, one coming, one going (when all ranks read,
    it held whole copies). Both start with what one rank would, bit for bit."""
    needs_deepspeed(strategy)
    recipes = []
    for name, (changes, _) in LOADED.items():
        changes = recipe_changes(changes, tmp_path / name, tiny_model) | {"model.init": LARGER}
        changes |= {"training.max_steps": 1, "training.save_steps": None}
        data = make_recipe_data(tiny_model, tmp_path, {"name": name.split("-")[0]}, changes)
        del data["model"]["path"]
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump(data))
    script = SCRIPTS / "held_weights.py"
    launch(tmp_path, strategy, script, *recipes)
    configs = {name: cls.Config for name, cls in METHODS.items()}
    alone, _ = load_policy(ModelConfig(init=LARGER), seed=load_recipe(recipes[0], [], configs).seed)
    start = runpy.run_path(str(script))["digest_of"](alone.state_dict().items())
    for name, (changes, models) in LOADED.items():
        first, second = (json.loads((tmp_path / name / f"held-{rank}.json").read_text()) for rank in (0, 1))
        assert first["start"] == second["start"] and (changes or first["start"] == start)
        assert first["most"] > 0.9 * models * first["policy"], "this one has all"
        part = models * second["policy"] / 2
        assert part * 0.9 < second["most"] < part + 2.1 * second["largest"], name


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_runs_end_with_the_same_models(sharded, strategy, tmp_path):
    runs = {name: run for name, run in sharded(strategy).items() if name in RESUMED}
    expected = {name: (weights(run), lines(run)) for name, run in runs.items()}
    for run in runs.values():
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "critic", ignore_errors=True)
        assert (run / "checkpoints" / "checkpoint-2").is_dir()
    recipes = [run.with_suffix(".yaml") for run in runs.values()]
    launch(tmp_path, strategy, SCRIPTS / "train_recipes.py", *recipes, RESUME="auto")
    for name, run in runs.items():
        assert largest_difference(weights(run), expected[name][0]) == 0
        assert without_clock(lines(run)) == without_clock(expected[name][1])


class Boom:
    """Touches a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.serve
@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_somebody_elses_checkpoint_is_resumed_on_demand_alone(strategy, write_case, tmp_path, monkeypatch):
    """Theirs holds a pickle that touches a file. Before checkpoints were signed, resuming from it did: the checksums of
    whoever wrote it are right, and the launch unpickled what it found."""
    needs_deepspeed(strategy)
    recipe, run, mark = write_case(tmp_path, "sft"), tmp_path / "sft", tmp_path / "mark"
    arguments = (strategy, SCRIPTS / "train_recipes.py", recipe)
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    launch(tmp_path, *arguments, XDG_STATE_HOME=mine)
    expected, step = weights(run), run / "checkpoints" / "checkpoint-2"
    kept = shutil.copytree(step, tmp_path / "kept")

    shutil.rmtree(run / "model")
    launch(tmp_path, *arguments, RESUME="auto", XDG_STATE_HOME=mine)
    assert largest_difference(weights(run), expected) == 0, "one's own is resumed"

    shutil.rmtree(run / "model")
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    staged = shutil.copytree(kept, tmp_path / "staged")
    (staged / unpickled(kept)[0]).write_bytes(pickle.dumps(Boom(mark)))
    state = {key: value for key, value in read_state(staged).items() if key not in ("format", "files")}
    monkeypatch.setenv("XDG_STATE_HOME", theirs)
    commit(staged, step, state)
    done = try_to_launch(tmp_path, *arguments, RESUME="auto", XDG_STATE_HOME=mine)
    assert done.returncode != 0 and "was not written by a run of this user" in done.stderr + done.stdout
    assert not mark.exists() and not (run / "model").exists()

    shutil.rmtree(step)
    commit(kept, step, state)  # an honest one, and theirs
    launch(tmp_path, *arguments, RESUME="auto", TRUST="yes", XDG_STATE_HOME=mine)
    assert largest_difference(weights(run), expected) == 0


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_files_as_they_are_train_with_adam(strategy, write_case, tmp_path):
    """The same as one rank where Adam's epsilon is so large that it does not blow up rounding."""
    needs_deepspeed(strategy)
    adam = {"training.optim": "adamw_torch", "training.adam_epsilon": 1.0, "training.max_grad_norm": 0.1}
    runs = {}
    for name in ("alone", "launched"):
        (tmp_path / name).mkdir()
        runs[name] = write_case(tmp_path / name, "grpo", adam)
    launch(tmp_path, strategy, "-m", "posttrain", "train", runs["launched"], as_shipped=True)
    assert_same_training(train_here(runs["alone"]), tmp_path / "launched" / "grpo")


# ------------------------------------------------------------------------------------------------------- a killed rank

DEADLINE = 60.0
"""Seconds from the kill to the end of the launcher."""


@pytest.mark.parametrize(
    ("strategy", "name", "moment", "phase"),
    [
        ("zero2", "grpo", "update:5", "training"),
        ("zero3", "grpo", "token:25", "preparing a step"),
        ("zero3", "drpo", "write:5", "saving a checkpoint"),
    ],
)
def test_a_killed_rank_ends_the_other_with_one_message(sharded, strategy, name, moment, phase, write_case, tmp_path):
    """The second rank kills itself in the third step, training, sampling or saving. The first says what it was doing
    (it has done its own sampling), and the resumed run ends as the one that was left alone."""
    runs = sharded(strategy)
    recipe, log = write_case(tmp_path, name), tmp_path / "log"
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command(tmp_path, strategy, SCRIPTS / "lose_a_rank.py", recipe),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MOMENT": moment, "DIED": str(tmp_path / "died")},
        )
    assert launcher.wait(600) != 0
    text, run = log.read_text(), tmp_path / name
    assert (tmp_path / "died").exists(), text
    assert time.time() - float((tmp_path / "died").read_text()) < DEADLINE
    assert text.count("another rank has ended") == 1, text
    assert f"another rank has ended while this one was {phase}" in text, text
    assert "--resume auto" in text
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["checkpoint-2"]
    launch(tmp_path, strategy, "-m", "posttrain", "train", recipe, "--resume", "auto")
    for folder in ("model", "critic") if (runs[name] / "critic").exists() else ("model",):
        assert largest_difference(weights(run, folder), weights(runs[name], folder)) == 0
    assert without_clock(lines(run)) == without_clock(lines(runs[name]))
