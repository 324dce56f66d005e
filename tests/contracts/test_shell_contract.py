"""The contracts through the real shells: data, rollouts, verifiers, TRL's trainer, optimizer and checkpoint files.

Every registered method must have a row in METHODS_RUN.
"""

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.contract.shell import DESCENT, Draws, called, metrics, moved_from, same_model, same_run, weights
from posttrain.methods import METHODS
from posttrain.models import saving, scoring_pass, shared_prefix
from posttrain.models.loading import DTYPES
from posttrain.tracking.tracker import Tracker
from posttrain.trainers.run import train

ROUNDING = 1e-4
"""Of the distance moved, what float32 leaves between sums in another order: on kernels without AVX2 it was 2e-5."""

TEACHER = {"path": "GUIDE", "start_weight": 1.0, "weight": 0.1, "decay_steps": 4, "rows": "wrong"}

REPLAYED = {"name": "prefixrl", "prefixed_share": 1.0, "terms": {"teacher": {"path": "GUIDE"}}}

METHODS_RUN = {
    "sft": [{"name": "sft"}],
    "grpo": [
        {"name": "grpo", "beta": 0.1},
        {"name": "grpo", "updates_per_rollout": 2, "aggregation": "tokens", "clip_cov": 0.2, "clip_cov_low": 0.01},
        {"name": "grpo", "terms": {"outcome": {}, "teacher": TEACHER, "shaping": {"clip": 0.5}, "entropy": {}}},
    ],
    "lite_ppo": [{"name": "lite_ppo"}],
    "chord": [
        {"name": "chord", "expert_rows_per_step": 6, "mu_warmup_steps": 1, "mu_decay_steps": 4, "mu_peak": 0.9},
        {"name": "chord", "expert_rows_per_step": 2, "updates_per_rollout": 2, "beta": 0.1},
    ],
    "red": [{"name": "red", "expert_rows_per_step": 4}],
    "prefixrl": [{"name": "prefixrl", "answer_pattern": "#"}, {"name": "prefixrl", "adapt": "success"}, REPLAYED],
    "rec": [
        {"name": "rec", "updates_per_rollout": 2},
        {"name": "rec", "clip": "none", "drop": "balanced", "weight": "advantage"},
    ],
    "a_star_po": [{"name": "a_star_po", "beta_2": 0.5, "updates_per_rollout": 2}],
    "sdft": [
        {"name": "sdft", "template": "{context};{prompt}", "average_rate": 0.3, "skip_tokens": 1},
        {
            "name": "sdft",
            "template": "{prompt}{context}",
            "context": "reference",
            "teacher": "start",
            "objective": "policy_gradient",
            "updates_per_rollout": 2,
        },
    ],
    "opmd": [{"name": "opmd", "divergence": "sequence"}],
    "asymre": [{"name": "asymre"}],
    "opd": [
        {"name": "opd", "teacher": "GUIDE", "updates_per_rollout": 2, "outcome_coef": 0.5},
        {
            "name": "opd",
            "teacher": "GUIDE",
            "objective": "top_k",
            "top_k": 4,
            "on_policy_share": 0.5,
            "expert_rows_per_step": 6,
        },
    ],
    "ui_s1": [{"name": "ui_s1", "filter_std": 0.0}],
    "ldc": [{"name": "ldc", "controllers": {"1": [0.0, 1.0]}, "updates_per_rollout": 2}],
    "rlsp": [{"name": "rlsp", "length_cost": 1.0, "alpha": 0.8}],
    "dpo": [{"name": "dpo"}],
    "online_dpo": [{"name": "online_dpo", "beta": 0.5, "pairs": "all"}],
    "xpo": [{"name": "xpo", "beta": 0.5, "alpha": 0.01, "own": 2}],
    "nash_md": [{"name": "nash_md", "beta": 0.05, "own": 2}],
    "simpo": [{"name": "simpo"}],
    "hypo": [{"name": "hypo", "lam": 0.05}],
    "curry_dpo": [{"name": "curry_dpo"}],
    "asft": [{"name": "asft"}],
    "tpo": [{"name": "tpo"}],
    "cpl": [{"name": "cpl"}],
    "orpo": [{"name": "orpo"}],
    "srpo": [{"name": "srpo"}],
    "kto": [{"name": "kto", "undesirable_weight": 2.0}],
    "bco": [{"name": "bco"}],
    "brain": [{"name": "brain", "n": 3}],
    "a_lol": [{"name": "a_lol"}],
    "oreo": [
        {"name": "oreo", "level": "step", "delimiter": ";", "kl_reg": 0.5},
        {"name": "oreo", "unbiased_kl": False, "single_step_actor_loss": True},
    ],
    "digirl": [{"name": "digirl", "actor_freeze_steps": 0, "curriculum_share": 0.3, "curriculum_rate": 0.5}],
    "archer": [
        {"name": "archer", "actor_freeze_steps": 1, "token_baseline": True, "actions_per_episode": 3},
        {"name": "archer", "actor_freeze_steps": 1, "actions": "recorded"},
    ],
    "dapo_step": [{"name": "dapo_step", "delimiter": ";", "beta": 0.5}],
    "ppo": [{"name": "ppo", "epochs": 2, "kl_target": 0.5}, {"name": "ppo", "epochs": 1, "minibatches": 2}],
    "rto": [{"name": "rto", "epochs": 2, "dpo_model": "GUIDE"}],
    "drpo": [
        {"name": "drpo", "epochs": 1, "reset_share": 0.5},
        {"name": "drpo", "optimizer": "group", "epochs": 2},
    ],
    "rlgf": [
        {"name": "rlgf", "epochs": 2, "expert_rows_per_step": 4},
        {"name": "rlgf", "variant": "d2lols", "tau": 2, "guide_model": "GUIDE", "epochs": 1},
        {"name": "rlgf", "variant": "lols", "ppo_pp_share": 0.5, "guide_model": "GUIDE", "epochs": 2},
    ],
    "sophia": [
        {
            "name": "sophia",
            "reasoner": "GUIDE",
            "reasonings": 2,
            "right": 0.5,
            "alpha_c": 0.0,
            "template": "{prompt}{answer}",
        }
        | {"description_end": "+", "description_tokens": 4},
    ],
    "nlpo": [{"name": "nlpo", "top_p": 0.6, "min_tokens_to_keep": 2, "epochs": 2}],
    "prm": [{"name": "prm", "separator": ";"}],
    "salmon": [
        {
            "name": "salmon",
            "principles": {"long": {"text": "1", "negative": "2"}},
            "template": "{principles}={prompt}",
            "passes": 2,
        }
    ],
    "reward": [{"name": "reward", "center_rewards_coefficient": 0.1}],
}
CASES = [row for rows in METHODS_RUN.values() for row in rows]


def name_of(method):
    return "-".join("_".join(v) if isinstance(v, dict) else str(v) for v in method.values())


def loads(folder, method):
    """The folder loads as what the method trains."""
    classifies = METHODS[method["name"]].shell == "reward"
    model, info = (AutoModelForSequenceClassification if classifies else AutoModelForCausalLM).from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_every_method_is_swept():
    assert set(METHODS_RUN) == set(METHODS)


@pytest.fixture(params=CASES, ids=name_of)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def two_rank_runs(tiny_model, make_recipe_data, tmp_path_factory, two_ranks):
    """All cases trained by one launch on two ranks, in micro-batches, every row whole: case -> run folder."""
    folder = tmp_path_factory.mktemp("ranks")
    recipes = {}
    for method in CASES:
        out = folder / name_of(method)
        recipes[name_of(method)] = out
        inputs = folder / f"{name_of(method)}-inputs"
        inputs.mkdir()
        data = make_recipe_data(tiny_model, inputs, method, {**DESCENT, "output": str(out), "batch.micro_batch": 4})
        (folder / f"{name_of(method)}.yaml").write_text(yaml.safe_dump(data))
    script = Path(__file__).with_name("train_in_float64.py")
    two_ranks([script, *(folder / f"{name}.yaml" for name in recipes)], folder / "ranks")
    return recipes


def test_micro_batches_on_two_ranks_train_the_same_model_as_one_batch_with_shared_prompts(
    method, two_rank_runs, load, tiny_model, tmp_path, monkeypatch
):
    recipe = load(
        method, {**DESCENT, "batch.micro_batch": 16}
    )  # its models are drawn in float32, as those of the ranks
    # In float64, where only a fault shows: in float32 other shapes are rounded otherwise, by kernels of the machine.
    monkeypatch.setitem(DTYPES, "float32", torch.float64)
    monkeypatch.setitem(saving.BYTES, "float64", 8)
    # Every shared prompt computed once, though that pays for larger models only.
    monkeypatch.setitem(shared_prefix.CALL_FLOPS, "cpu", 0.0)
    monkeypatch.setattr(shared_prefix, "MERGE_FLOPS", 0)
    real, layouts = scoring_pass.plan, []

    def counted(*args, **kwargs):
        made = real(*args, **kwargs)
        layouts.append(made.layout is not None)
        return made

    monkeypatch.setattr(scoring_pass, "plan", counted)
    one = train(recipe).run_dir
    scores = METHODS[method["name"]].shell != "reward"  # a classifier scores sequences by a pass of its own
    assert any(layouts) == scores
    two = two_rank_runs[name_of(method)]
    same_model(one, two, tiny_model, ROUNDING, 1e-5)
    for single, double in zip(metrics(one), metrics(two), strict=True):
        assert set(single) == set(double)
        for key in single:
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key


STOPPED = 3
"""The step in which a run is interrupted."""

STEPS = 6
"""Those of a whole run: the data are read twice, 16 prompts by four and 40 rows and more by sixteen."""


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(method, load, tmp_path, monkeypatch):
    steps: dict = {"training.max_steps": STEPS}
    if METHODS[method["name"]].shell == "online":
        steps["data.prompts.size"] = 16
    recipe = load(method, {"output": str(tmp_path / "parts"), **steps})
    log = Tracker.log

    def log_and_interrupt(self, step, row):
        log(self, step, row)
        if step == STOPPED:
            os.kill(os.getpid(), signal.SIGINT)  # a real Ctrl-C, in the middle of a step

    with called(Draws):
        whole = train(load(method, {"output": str(tmp_path / "whole"), **steps}))
        with monkeypatch.context() as interrupted:
            interrupted.setattr(Tracker, "log", log_and_interrupt)
            stopped = train(recipe)
        assert stopped.stopped and STOPPED <= stopped.steps < STEPS
        loads(stopped.checkpoint, method)
        AutoTokenizer.from_pretrained(stopped.checkpoint)
        assert not stopped.model_dir.exists()
        resumed = train(recipe, resume="auto")
    assert resumed.steps == STEPS and not resumed.stopped
    same_run(whole.run_dir, resumed.run_dir)


def test_ctrl_c_on_the_command_line_says_how_to_go_on(write_recipe, apart, tmp_path):
    recipe = write_recipe({"name": "sft"}, {"training.max_steps": 5000})
    said = tmp_path / "said"
    process = apart(["-m", "posttrain", "train", recipe], said)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    output = said.read_text()
    assert process.exitcode == 130, output
    assert f"posttrain train {recipe} --resume auto" in " ".join(output.split())
    assert "Traceback" not in output


LORA, BF16 = {"model.peft": {"type": "lora", "r": 4}}, {"training.bf16": True}
ONE_OF_A_SHELL = {METHODS[method["name"]].shell: method for method in reversed(CASES)}


def test_lora_trains_and_saves_a_loadable_model(method, load, tiny_model):
    # In float32, where a tenth of an adapter is told apart: in bfloat16 it is not.
    trains_and_saves(method, LORA, load, tiny_model)


@pytest.mark.parametrize("changes", [BF16, LORA | BF16], ids=["bf16", "lora-bf16"])
@pytest.mark.parametrize("shell", ONE_OF_A_SHELL)
def test_bf16_trains_and_saves_a_loadable_model(shell, changes, load, tiny_model):
    trains_and_saves(ONE_OF_A_SHELL[shell], changes, load, tiny_model)


def trains_and_saves(method, changes, load, tiny_model):
    if "model.peft" in changes and method["name"] == "curry_dpo":
        method = {**method, "refresh_reference": False}  # refused with an adapter
    result = train(load(method, {**changes, "training.save_steps": 2}))
    found, start = weights(result.model_dir), weights(tiny_model)
    assert moved_from(tiny_model, result.run_dir) > 1e-4
    assert all(math.isfinite(row["loss"]) for row in metrics(result.run_dir))
    loads(result.model_dir, method)
    if "model.peft" in changes:
        assert (result.run_dir / "adapter" / "adapter_model.safetensors").is_file()
        name = "model.embed_tokens.weight"
        assert torch.equal(found[name], start[name])  # only the adapted layers moved
