"""The tables of names against the installed transformers, and what a wrong value of every `training` key is told."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from posttrain.config.loading import load_recipe_with_locations
from posttrain.config.schema import TrainingConfig
from posttrain.config.trainer_names import (
    BITSANDBYTES,
    NOT_OFFERED,
    OPTIMIZERS,
    REQUIRED,
    SCHEDULES,
    TRACKERS,
)
from posttrain.errors import PosttrainError
from posttrain.methods import METHODS
from posttrain.trainers.rows import refuse

RECIPE = """
model: {init: {hidden_size: 16, layers: 1}}
data: {completions: {path: rows.jsonl, completion: answer}}
method: {name: sft}
batch: {rows_per_step: 2, micro_batch: 2}
training: {learning_rate: 1.0e-3, max_steps: 10}
output: run
"""

EXAMPLES = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1, "num_cycles": 0.5},
    "cosine_warmup_with_min_lr": {"min_lr": 0.0001, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 3, "warmup_type": "cosine", "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
    "polynomial": {"lr_end": 0.0001, "power": 2},
    "inverse_sqrt": {"timescale": 20},
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 2},
}


@pytest.fixture
def refused(tmp_path: Path):
    """The error that a recipe with these overrides gets, or None."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def ask(*overrides: str) -> PosttrainError | None:
        try:
            configs = {name: method.Config for name, method in METHODS.items()}
            recipe, locations = load_recipe_with_locations(tmp_path / "recipe.yaml", overrides, configs)
            refuse(recipe, METHODS[recipe.method.name](recipe.method), locations)
        except PosttrainError as error:
            return error
        return None

    return ask


def test_every_optimizer_of_transformers_is_offered_or_refused_with_its_reason() -> None:
    from transformers.training_args import OptimizerNames

    assert {name.value for name in OptimizerNames} == set(OPTIMIZERS) | set(NOT_OFFERED)
    assert not set(OPTIMIZERS) & set(NOT_OFFERED)


def test_every_tracker_of_transformers_is_known() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) == set(TRACKERS)


def test_schedules_take_the_arguments_that_transformers_gives_them() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    offered = set(SCHEDULES)
    assert offered == {name.value for name in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}  # these read metrics
    given_by_the_trainer = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, known in SCHEDULES.items():
        parameters = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters)
        assert set(known) == parameters - given_by_the_trainer, name
        assert set(REQUIRED.get(name, ())) <= set(known)


def test_schedules_that_are_accepted_can_be_built(refused) -> None:
    import torch
    from transformers.optimization import get_scheduler

    for name in SCHEDULES:
        kwargs = EXAMPLES.get(name, {})
        written = ", ".join(
            f"{key}: {value:f}" if isinstance(value, float) else f"{key}: {value}" for key, value in kwargs.items()
        )
        assert refused(f"training.lr_scheduler_type={name}", f"training.lr_scheduler_kwargs={{{written}}}") is None
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = get_scheduler(name, optimizer, 2, 10, scheduler_specific_kwargs=kwargs)
        optimizer.step()
        scheduler.step()


WRONG: dict[str, list[tuple[str, str]]] = {
    "learning_rate": [("0", "greater than 0"), ("fast", "expected a number")],
    "max_steps": [("0", "at least 1"), ("1.5", "whole number")],
    "num_train_epochs": [("1", "exactly one of"), ("-1", "greater than 0")],
    "lr_scheduler_type": [("cosin", "did you mean 'cosine'?"), ("reduce_lr_on_plateau", "expected")],
    "lr_scheduler_kwargs": [
        ("{num_cycles: 2}", "takes no 'num_cycles'"),
        ("{min_lr_rate: 0.1}", "takes no 'min_lr_rate'"),
        ("[1]", "expected"),
    ],
    "warmup_steps": [("-1", "at least 0")],
    "weight_decay": [("-0.1", "at least 0")],
    "adam_beta1": [("1.0", "must be")],
    "adam_beta2": [("1.0", "must be")],
    "adam_epsilon": [("0", "greater than 0")],
    "max_grad_norm": [("-1", "at least 0")],
    "bf16": [("maybe", "expected true or false")],
    "gradient_checkpointing": [("1", "expected true or false")],
    "optim": [
        ("adamw_torc", "did you mean 'adamw_torch'?"),
        ("adamw_hf", "unknown optimizer"),
        ("galore_adamw", "is not offered"),
        ("schedule_free_adamw", "is not offered"),
        ("adamw_anyprecision", "needs the package torchdistx, which is not installed"),
    ],
    "save_steps": [("0", "at least 1")],
    "save_total_limit": [("0", "at least 1")],
    "logging_steps": [("0", "at least 1")],
    "report_to": [
        ("[tensorbord]", "did you mean 'tensorboard'?"),
        ("[azure_ml]", "needs the package azureml, which is not installed"),
        ("[none, wandb]", "stands alone"),
        ("tensorboard", "write [tensorboard]"),
    ],
    "run_name": [("[1]", "expected")],
    "push_to_hub": [("maybe", "expected true or false")],
    "hub_model_id": [("[1]", "expected")],
    "hub_private_repo": [("maybe", "expected true or false")],
    "hub_strategy": [("every_save", "expected")],
}
"""Key -> wrong values and what is said of them."""


def test_a_wrong_value_of_every_training_key_is_refused_with_its_key(refused) -> None:
    assert refused() is None
    schema: type[BaseModel] = TrainingConfig
    unswept = set(schema.model_fields) - set(WRONG)
    assert not unswept, f"give a wrong value of {unswept}"
    for key, values in WRONG.items():
        for value, said in values:
            error = refused(f"training.{key}={value}")
            assert error is not None and said in str(error), (key, value, str(error))
            assert "training" in str(error) and (key in str(error)), (key, value, str(error))


def test_arguments_of_a_schedule(refused) -> None:
    def ask(schedule: str, kwargs: str) -> str:
        return str(refused(f"training.lr_scheduler_type={schedule}", f"training.lr_scheduler_kwargs={kwargs}"))

    assert "needs exactly one of min_lr and min_lr_rate" in ask("cosine_with_min_lr", "{num_cycles: 0.5}")
    assert "needs exactly one of min_lr and min_lr_rate" in ask("cosine_with_min_lr", "{min_lr: 0, min_lr_rate: 0}")
    assert "needs num_decay_steps" in ask("warmup_stable_decay", "{num_stable_steps: 3}")
    assert "num_cycles must be a number above 0, got 0" in ask("cosine", "{num_cycles: 0}")
    assert "lr_end 0.01 is not below training.learning_rate 0.001" in ask("polynomial", "{lr_end: 0.01}")
    assert "did you mean 'num_cycles'?" in ask("cosine", "{num_cycle: 1}")


def test_a_package_that_is_there_is_accepted(refused, monkeypatch) -> None:
    for module, override in (
        ("torchdistx", "training.optim=adamw_anyprecision"),
        ("clearml", "training.report_to=[clearml]"),
    ):
        assert "is not installed" in str(refused(override))
        stand_in = ModuleType(module)
        stand_in.__spec__ = sys.__spec__
        monkeypatch.setitem(sys.modules, module, stand_in)
        assert refused(override) is None
    assert "KUBEFLOW" in str(refused("training.report_to=[kubeflow]"))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://localhost")
    assert refused("training.report_to=[kubeflow]") is None
    assert refused("training.report_to=[all]") is None and refused("training.report_to=[none]") is None


def test_bitsandbytes_that_is_absent_is_named_before_anything_is_loaded(refused, monkeypatch) -> None:
    of_a_base = ("model={path: owner/model, peft: {type: lora}, quantization: {bits: 4}}",)
    asked = [(f"training.optim={name}",) for name in BITSANDBYTES] + [of_a_base]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for overrides in asked:
        assert "needs the package bitsandbytes, which is not installed" in str(refused(*overrides)), overrides
    stand_in = ModuleType("bitsandbytes")
    stand_in.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    assert [refused(*overrides) for overrides in asked] == [None] * len(asked)
