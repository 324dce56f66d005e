"""Every precision under every launch, in every shell, full and with an adapter: it trains what one rank trains, up to
the precision's rounding; what it saves loads and is whole; and its last step, resumed, is the same bit for bit.

Two ranks with real processes. A launch trains all its cells of a precision one after the other, because imports take
longer than they do; `contracts/train_cells.py` has what is checked inside.
"""

import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.methods import METHODS
from posttrain.trainers import run as trainers

pytestmark = pytest.mark.slow

LAUNCH = runpy.run_path(str(Path(__file__).with_name("test_launch.py")))
SCRIPT = LAUNCH["SCRIPTS"] / "train_cells.py"

SHELLS = {
    "sft": {"name": "sft"},
    "dpo": {"name": "dpo"},
    "grpo": {"name": "grpo", "beta": 0.1},
    "ppo": {"name": "ppo", "epochs": 1},
    "oreo": {"name": "oreo", "level": "step", "delimiter": ";", "actor_freeze_steps": 1},
    "reward": {"name": "reward"},
}
"""A method for each shell, and one that is online with a critic."""

PRECISIONS = {
    "float32": {},
    "autocast": {"training.bf16": True},
    "bfloat16": {"model.dtype": "bfloat16"},
}
ADAPTERS = {"full": {}, "lora": LAUNCH["LORA"]}
LAUNCHES = ("one", "cpu", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
NAMES = ["-".join(parts) for parts in itertools.product(ADAPTERS, SHELLS)]
CELLS = list(itertools.product(LAUNCHES, PRECISIONS, NAMES))
SERVED = ("full-sft", "full-grpo", "lora-dpo")
"""What `make test-serve` runs of them, under ZeRO-3."""

ROUNDING = {"float32": 1e-4, "autocast": 0.1, "bfloat16": 0.1}
"""Largest difference between the updates of one and of two ranks, relative to the update: the unit roundoff (6e-8 in
float32, 4e-3 in bfloat16), some tens of times over, since the terms of a gradient cancel each other."""


ONLINE = ("grpo", "ppo")
CRITIC = ("ppo", "oreo")


def changes_of(precision, name, folder, model):
    adapter, shell = name.split("-")
    changes = LAUNCH["recipe_changes"]({**PRECISIONS[precision], **ADAPTERS[adapter]}, folder / name, model)
    changes |= {"training.max_steps": 2, "training.save_steps": 1}
    changes |= {"batch.prompts_per_step": 2} if shell in ONLINE else {"batch.rows_per_step": 8}
    return changes | ({"training.learning_rate": 0.1} if shell in CRITIC else {})


@pytest.fixture(scope="module")
def trained(tiny_model, make_recipe_data, tmp_path_factory):
    """`trained(launch, precision, names)` -> name -> run folder, all trained by one launch."""
    known = {}

    def runs(*cells):
        if cells not in known:
            known[cells] = None
            known[cells] = run(*cells)
        assert known[cells] is not None, "this launch failed in a test before"
        return known[cells]

    def run(launch, precision, names):
        LAUNCH["needs_deepspeed"](launch)
        alone = None if launch == "one" else runs("one", precision, names)
        folder, recipes = tmp_path_factory.mktemp(f"{launch}-{precision}"), []
        for name in names:
            changes = changes_of(precision, name, folder, tiny_model)
            data = make_recipe_data(tiny_model, folder, SHELLS[name.split("-")[1]], changes)
            recipes.append(folder / f"{name}.yaml")
            recipes[-1].write_text(yaml.safe_dump(data))
        rollouts = folder if alone is None else alone[names[0]].parent
        if alone is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "ROLLOUTS": str(rollouts)}
            command = [sys.executable, str(SCRIPT), *map(str, recipes)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        else:
            LAUNCH["launch"](folder, launch, SCRIPT, *recipes, ROLLOUTS=str(rollouts))
        return {name: folder / name for name in names}

    return runs


def tensors(folder):
    return {name: tensor.double() for name, tensor in load_file(next(folder.glob("*.safetensors"))).items()}


def difference(one, two, start, rounded):
    """Norm of the difference, relative to the norm of what training has changed.

    `rounded`: of each tensor but for what rounding it to bfloat16 makes, at most 2^-8 of each weight.
    """
    common = one.keys() & two.keys()
    assert common == one.keys() and all(name == "lm_head.weight" for name in two.keys() - common)  # a tied head
    moved = sum(float((one[name] - start.get(name, torch.zeros(()))).square().sum()) for name in common)
    free = {name: float(two[name].norm()) / 256 if rounded else 0.0 for name in common}
    apart = sum(max(0.0, float((one[name] - two[name]).norm()) - free[name]) ** 2 for name in common)
    assert moved > 0
    return (apart / moved) ** 0.5


def check_cell(one, two, precision, name, start):
    adapter, shell = name.split("-")
    # With training.bf16 DeepSpeed trains and saves weights in bfloat16, of which it keeps copies in float32.
    rounded = precision == "autocast" and "zero" in two.parent.name
    trained = ["adapter" if adapter == "lora" else "model"] + ["critic"] * (shell in CRITIC)
    for folder in trained:
        ours, theirs = tensors(two / folder), tensors(one / folder)
        if folder == "adapter":  # A is random at the start, and B, of which training begins, is zero
            ours, theirs = ({k: v for k, v in each.items() if "lora_A" not in k} for each in (ours, theirs))
        apart = difference(theirs, ours, start, rounded)
        print(f"{two.parent.name} {name} {folder}: {apart:.1e} of the update")
        assert apart < ROUNDING[precision], folder
    agreed, sampled = map(sum, zip(*(json.loads(p.read_text()) for p in two.glob("agreed-*.json")), strict=True))
    assert sampled == (16 if shell in ONLINE else 0)
    assert agreed == sampled or precision != "float32"
    for folder in {"model", *trained}:  # saved, and the same when its last step is resumed
        if folder != "adapter":
            classifier = folder == "critic" or shell == "reward"
            kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
            model, info = kind.from_pretrained(two / folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            assert all(parameter.numel() for parameter in model.parameters())
        first, again = tensors(two / "first" / folder), tensors(two / folder)
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


@pytest.fixture(scope="module")
def start(tiny_model):
    return tensors(tiny_model)


@pytest.mark.parametrize(("launch", "precision", "name"), CELLS)
def test_a_cell_of_the_matrix(trained, launch, precision, name, start):
    run = trained(launch, precision, tuple(NAMES))[name]
    check_cell(trained("one", precision, tuple(NAMES))[name], run, precision, name, start)


def test_the_size_of_the_matrix(capsys):
    sizes = [len(axis) for axis in (LAUNCHES, PRECISIONS, ADAPTERS, SHELLS)]
    assert len(CELLS) == math.prod(sizes) == len(set(CELLS))
    assert {METHODS[method["name"]].shell for method in SHELLS.values()} == set(trainers.SHELLS)
    with capsys.disabled():
        print(
            "\n{} cells: {} launches x {} precisions x full and LoRA x {} methods".format(
                len(CELLS), *sizes[:2], sizes[3]
            )
        )


@pytest.mark.serve
def test_zero3_in_bfloat16(trained, start):
    one, three = (trained(launch, "autocast", SERVED) for launch in ("one", "zero3"))
    for name in SERVED:
        check_cell(one[name], three[name], "autocast", name, start)
