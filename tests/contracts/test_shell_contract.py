"""The contracts through the real shells: data, rollouts, verifiers, TRL's trainer, optimizer and checkpoint files.

Every registered method must have a row in METHODS_RUN.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.methods import METHODS
from posttrain.trainers.run import train

METHODS_RUN = {
    "sft": [{"name": "sft"}],
    "grpo": [{"name": "grpo", "beta": 0.1}, {"name": "grpo", "updates_per_rollout": 2, "aggregation": "tokens"}],
    "lite_ppo": [{"name": "lite_ppo"}],
    "dpo": [{"name": "dpo"}],
    "simpo": [{"name": "simpo"}],
    "hypo": [{"name": "hypo", "lam": 0.05}],
    "curry_dpo": [{"name": "curry_dpo"}],
    "asft": [{"name": "asft"}],
    "tpo": [{"name": "tpo"}],
    "cpl": [{"name": "cpl"}],
    "srpo": [{"name": "srpo"}],
    "brain": [{"name": "brain", "n": 3}],
    "a_lol": [{"name": "a_lol"}],
}
CASES = [row for rows in METHODS_RUN.values() for row in rows]


# Plain gradient descent: Adam would blow the rounding of tiny gradients up to the size of its step.
DESCENT = {"training.optim": "sgd", "training.learning_rate": 0.5, "training.max_grad_norm": 0.0}


def name_of(method):
    return "-".join(str(v) for v in method.values())


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def metrics(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


CLOCK = ("time", "step_seconds", "rollout_seconds", "verify_seconds", "tokens_per_second", "wall_seconds")


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def test_every_method_is_swept():
    assert set(METHODS_RUN) == set(METHODS)


@pytest.fixture(params=CASES, ids=name_of)
def method(request):
    return request.param


def test_any_micro_batch_trains_the_same_model(method, load, tiny_model, tmp_path):
    results = {}
    for micro_batch in (16, 4):
        out = tmp_path / str(micro_batch)
        result = train(load(method, {**DESCENT, "batch.micro_batch": micro_batch, "output": str(out)}))
        results[micro_batch] = weights(result.model_dir), metrics(out)
    moved = largest_difference(results[16][0], weights(tiny_model))
    assert moved > 1e-3  # it learned something
    assert largest_difference(results[16][0], results[4][0]) < 1e-5 * max(moved, 0.1)
    for whole, split in zip(results[16][1], results[4][1], strict=True):
        assert split["loss"] == pytest.approx(whole["loss"], abs=1e-5)
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
        assert split["tokens_trained"] == whole["tokens_trained"]


@pytest.fixture(scope="module")
def two_rank_runs(tiny_model, make_recipe_data, tmp_path_factory):
    """All cases trained on two ranks by one launch: case -> run folder."""
    folder = tmp_path_factory.mktemp("ranks")
    recipes = {}
    for method in CASES:
        out = folder / name_of(method)
        recipes[name_of(method)] = out
        data = make_recipe_data(tiny_model, folder, method, {**DESCENT, "output": str(out), "batch.micro_batch": 4})
        (folder / f"{name_of(method)}.yaml").write_text(yaml.safe_dump(data))
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        + [str(Path(__file__).with_name("train_recipes.py")), *(str(folder / f"{name}.yaml") for name in recipes)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return recipes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_train_the_same_model(method, two_rank_runs, load, tiny_model, tmp_path):
    alone = train(load(method, DESCENT)).run_dir
    two = two_rank_runs[name_of(method)]
    moved = largest_difference(weights(alone / "model"), weights(tiny_model))
    assert largest_difference(weights(alone / "model"), weights(two / "model")) < 1e-5 * max(moved, 0.1)
    for single, double in zip(metrics(alone), metrics(two), strict=True):
        assert set(single) == set(double)
        for key in set(single) - set(CLOCK):
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key


def interrupt_when(path, lines):
    """Send this process a Ctrl-C, from a thread, once the file has that many lines."""

    def wait():
        deadline = time.monotonic() + 60
        while not (path.exists() and len(path.read_text().splitlines()) >= lines):
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(method, load, tmp_path):
    steps = {"training.max_steps": 40}
    whole = train(load(method, {"output": str(tmp_path / "whole"), **steps}))
    recipe = load(method, {"output": str(tmp_path / "parts"), **steps})
    interrupt_when(tmp_path / "parts" / "metrics.jsonl", 3)
    stopped = train(recipe)
    assert stopped.stopped and 3 <= stopped.steps < 40
    AutoModelForCausalLM.from_pretrained(stopped.checkpoint)
    AutoTokenizer.from_pretrained(stopped.checkpoint)
    assert not stopped.model_dir.exists()

    resumed = train(recipe, resume="auto")
    assert resumed.steps == 40 and not resumed.stopped
    one, other = weights(whole.model_dir), weights(resumed.model_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert without_clock(metrics(resumed.run_dir)) == without_clock(metrics(whole.run_dir))


def test_ctrl_c_on_the_command_line_says_how_to_go_on(write_recipe, tmp_path):
    recipe = write_recipe({"name": "sft"}, {"training.max_steps": 5000})
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain", "train", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"posttrain train {recipe} --resume auto" in " ".join(output.split())
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "changes", [{"model.peft": {"type": "lora", "r": 4}}, {"training.bf16": True}], ids=["lora", "bf16"]
)
def test_lora_and_bf16_train_and_save_a_loadable_model(method, changes, load, tiny_model, tmp_path):
    if "model.peft" in changes and method["name"] == "curry_dpo":
        method = {**method, "refresh_reference": False}  # refused with an adapter
    result = train(load(method, {**changes, "training.save_steps": 2}))
    found, start = weights(result.model_dir), weights(tiny_model)
    assert largest_difference(found, start) > 1e-4
    assert all(math.isfinite(row["loss"]) for row in metrics(result.run_dir))
    AutoModelForCausalLM.from_pretrained(result.model_dir)
    if "model.peft" in changes:
        assert (result.run_dir / "adapter" / "adapter_model.safetensors").is_file()
        name = "model.embed_tokens.weight"
        assert torch.equal(found[name], start[name])  # only the adapted layers moved
