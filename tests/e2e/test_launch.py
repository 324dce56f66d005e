"""`accelerate launch` on two CPU ranks trains the model that one rank trains: DDP, ZeRO-2, ZeRO-3; real processes.

One launch per strategy, with its file of launch/accelerate, trains all recipes one after the other. Under ZeRO-3 small
tensors are sharded too (threshold 0), which it would leave whole in a model of this size.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.trainers.run import train

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# Plain gradient descent: Adam would blow the rounding of tiny gradients up to the size of its step.
DESCENT = {"training.optim": "sgd", "training.learning_rate": 0.5, "training.max_grad_norm": 0.0}
CASES = {
    "sft": ({"name": "sft"}, {}),
    "dpo": ({"name": "dpo"}, {}),
    "simpo": ({"name": "simpo"}, {}),
    "hypo": ({"name": "hypo", "lam": 0.05}, {}),
    "grpo": ({"name": "grpo", "beta": 0.1}, {}),
    "grpo-lora": ({"name": "grpo"}, {"model.peft": {"type": "lora", "r": 4}}),
    "chord": ({"name": "chord", "expert_rows_per_step": 6, "mu_warmup_steps": 1, "mu_decay_steps": 4}, {}),
    "prefixrl": ({"name": "prefixrl", "answer_pattern": "#"}, {}),
    "oreo": ({"name": "oreo", "level": "step", "delimiter": ";"}, {"training.learning_rate": 0.05}),
    "drpo": ({"name": "drpo", "updates_per_rollout": 1, "reset_share": 0.5}, {"training.learning_rate": 0.1}),
}
if importlib.util.find_spec("vllm") is not None:  # every rank with an engine of its own
    CASES |= {
        "grpo-vllm": ({"name": "grpo"}, {"rollouts.engine": "vllm"}),
        "grpo-vllm-lora": ({"name": "grpo"}, {"rollouts.engine": "vllm", "model.peft": {"type": "lora", "r": 4}}),
    }
STRATEGIES = ("cpu", "zero2", "zero3")
RESUMED = "grpo"
CLOCK = (
    "time",
    "step_seconds",
    "rollout_seconds",
    "verify_seconds",
    "sync_seconds",
    "tokens_per_second",
    "wall_seconds",
)
ROUNDING = ("canary_logp_diff_max", "engine_logp_diff_max", "engine_logp_diff_mean")


def recipe_changes(changes, out, model):
    changes = {**DESCENT, **changes, "batch.micro_batch": 4, "training.save_steps": 2, "output": str(out)}
    return changes | {"model.path": str(model)} if "rollouts.engine" in changes else changes


def launch(folder, strategy, *arguments):
    """Run `accelerate launch` on two ranks with the settings of launch/accelerate."""
    config = yaml.safe_load((ROOT / "launch" / "accelerate" / f"{strategy}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2}
    if strategy != "cpu":
        config |= {"deepspeed_config": deepspeed_config(folder, config["deepspeed_config"]["zero_stage"])}
        del config["mixed_precision"]  # accelerate refuses it beside a DeepSpeed file
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
        + ["--main_process_port", str(port), *arguments],
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def deepspeed_config(folder, stage):
    settings = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,  # SGD
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    return {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": False}


@pytest.fixture(scope="module", params=STRATEGIES)
def sharded(request, tiny_model, vllm_model, make_recipe_data, tmp_path_factory):
    """(strategy, name -> run folder), all trained by one launch."""
    if request.param != "cpu" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    paths = []
    for name, (method, changes) in CASES.items():
        data = make_recipe_data(tiny_model, folder, method, recipe_changes(changes, folder / name, vllm_model))
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(data))
    launch(folder, request.param, str(ROOT / "tests" / "contracts" / "train_recipes.py"), *map(str, paths))
    return request.param, {name: folder / name for name in CASES}


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_the_model_of_one(name, sharded, load, vllm_model, tmp_path):
    method, changes = CASES[name]
    alone = train(load(method, recipe_changes(changes, tmp_path / "alone", vllm_model))).run_dir
    run = sharded[1][name]
    ours, theirs = weights(run), weights(alone)
    if sharded[0] == "zero2" and "lm_head.weight" in ours.keys() - theirs.keys():  # a tied head, written twice
        assert torch.equal(ours.pop("lm_head.weight"), ours["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 2e-5
    rows = list(zip(metrics(alone), metrics(run), strict=True))
    assert len(rows) == 3
    for single, double in rows:
        assert set(single) == set(double)
        for key in set(single) - set(CLOCK) - set(ROUNDING):
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key
        assert all(double.get(key, 0.0) < 1e-5 for key in ROUNDING)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_a_whole_hugging_face_model(name, sharded):
    model, info = AutoModelForCausalLM.from_pretrained(sharded[1][name] / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(parameter.numel() for parameter in model.parameters())


def test_a_resumed_run_ends_with_the_same_model(sharded, tmp_path):
    strategy, runs = sharded
    run = runs[RESUMED]
    expected, logged = weights(run), metrics(run)
    shutil.rmtree(run / "model")
    assert (run / "checkpoints" / "checkpoint-2").is_dir()
    launch(tmp_path, strategy, "-m", "posttrain", "train", str(run.with_suffix(".yaml")), "--resume", "auto")
    found = weights(run)
    assert all((found[key] == expected[key]).all() for key in expected)
    without = [{k: v for k, v in row.items() if k not in CLOCK} for row in logged]
    assert [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(run)] == without
