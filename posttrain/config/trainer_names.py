"""Names that Hugging Face's TrainingArguments take as text: optimizers, learning-rate schedules and trackers.

They are checked here because transformers finds a wrong one only after the model has been loaded, and an optimizer's
package only at the first step. A test holds the tables against the installed transformers. Imports without torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TypeGuard

from posttrain.config.locations import Locations
from posttrain.config.schema import Recipe, TrainingConfig
from posttrain.errors import RecipeError, StackError, nearest

BITSANDBYTES = (
    *("ademamix", "ademamix_8bit", "adamw_8bit", "adamw_bnb_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit"),
    *("paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)

OPTIMIZERS: dict[str, str | None] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")),
    **dict.fromkeys(BITSANDBYTES, "bitsandbytes"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
}
"""Optimizer -> the package that it needs beside torch and transformers."""

NOT_OFFERED = {
    **dict.fromkeys(
        (
            *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise"),
            *("galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise"),
        ),
        "it needs a choice of modules (optim_target_modules), which a recipe does not have",
    ),
    **dict.fromkeys(("lomo", "adalomo"), "it updates within the backward pass, before a step's losses are divided"),
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "the weights it trains with are not the ones to sample, evaluate and save",
    ),
}
"""Optimizers of transformers that no shell can run, and why."""

TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "codecarbon": ("codecarbon",),
    "clearml": ("clearml",),
    "dagshub": ("dagshub",),
    "flyte": ("flytekit",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "kubeflow": (),
}
"""Tracker -> packages of which it needs one; kubeflow needs a variable of its own."""

KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_URL"

_Rule = tuple[str, Callable[[object], bool]]


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


POSITIVE: _Rule = ("a number above 0", lambda value: _number(value) and value > 0)
NOT_NEGATIVE: _Rule = ("a number from 0", lambda value: _number(value) and value >= 0)
SHARE: _Rule = ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
STEPS: _Rule = ("a whole number from 0", lambda value: _number(value) and value >= 0 and value == int(value))
FORM: _Rule = ("linear, cosine or 1-sqrt", lambda value: value in ("linear", "cosine", "1-sqrt"))
RATES: dict[str, _Rule] = {"num_cycles": POSITIVE, "min_lr": NOT_NEGATIVE, "min_lr_rate": SHARE}

SCHEDULES: dict[str, dict[str, _Rule]] = {
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine": {"num_cycles": POSITIVE},
    "cosine_with_restarts": {"num_cycles": POSITIVE},
    "polynomial": {"lr_end": NOT_NEGATIVE, "power": POSITIVE},
    "inverse_sqrt": {"timescale": POSITIVE},
    "cosine_with_min_lr": RATES,
    "cosine_warmup_with_min_lr": RATES | {"warmup_lr_rate": SHARE},
    "warmup_stable_decay": {
        "num_decay_steps": STEPS,
        "num_stable_steps": STEPS,
        "warmup_type": FORM,
        "decay_type": FORM,
        "min_lr_ratio": SHARE,
        "num_cycles": POSITIVE,
    },
}
"""Schedule -> what its `lr_scheduler_kwargs` may hold."""

REQUIRED: dict[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Schedule -> keyword arguments of which it needs exactly one."""


def check_training(recipe: Recipe, locations: Locations) -> Iterator[RecipeError | StackError]:
    """What transformers would refuse of the `training` section, with the places of the keys."""
    for key, check in (("optim", _optimizer), ("report_to", _trackers), ("lr_scheduler_kwargs", _schedule)):
        for what, hint, absent in check(recipe.training):
            error = StackError if absent else RecipeError
            yield error(what, where=locations.where(("training", key)), hint=hint)


_Fault = tuple[str, str, bool]
"""What is wrong, what to do, and whether a package is all that is missing."""


def _optimizer(training: TrainingConfig) -> Iterator[_Fault]:
    name = training.optim
    if name in NOT_OFFERED:
        yield f"optimizer {name} is not offered: {NOT_OFFERED[name]}", "take adamw_torch_fused, or adafactor", False
    elif name not in OPTIMIZERS:
        yield f"unknown optimizer {name!r}", nearest(name, OPTIMIZERS), False
    elif (package := OPTIMIZERS[name]) is not None and not _installed(package):
        yield f"optimizer {name} needs the package {package}, which is not installed", _how_to_get(package), True


def _trackers(training: TrainingConfig) -> Iterator[_Fault]:
    for name in training.report_to:
        if name in ("all", "none"):
            if len(training.report_to) > 1:
                yield f"report_to {name!r} stands alone", "remove the others", False
            continue
        if name not in TRACKERS:
            yield f"unknown tracker {name!r}", nearest(name, TRACKERS), False
        elif name == "kubeflow":
            if KUBEFLOW not in os.environ:
                yield f"tracker kubeflow needs the environment variable {KUBEFLOW}", "set it, or remove it", True
        elif not any(map(_installed, TRACKERS[name])):
            packages = " or ".join(TRACKERS[name])
            hint = f"{_how_to_get(TRACKERS[name][0])}, or remove it: metrics.jsonl is written in any case"
            yield f"tracker {name} needs the package {packages}, which is not installed", hint, True


def _schedule(training: TrainingConfig) -> Iterator[_Fault]:
    name, given = training.lr_scheduler_type, training.lr_scheduler_kwargs or {}
    known = SCHEDULES[name]
    for key, value in given.items():
        if key not in known:
            hint = nearest(key, known) or "leave lr_scheduler_kwargs out"
            yield f"the schedule {name} takes no {key!r}", hint, False
        elif not known[key][1](value):
            yield f"{key} must be {known[key][0]}, got {value!r}", "", False
    one_of = REQUIRED.get(name, ())
    if one_of and sum(key in given for key in one_of) != 1:
        amount = "exactly one of " if len(one_of) > 1 else ""
        example = f"lr_scheduler_kwargs: {{{one_of[-1]}: {100 if 'steps' in one_of[-1] else 0.1}}}"
        yield f"the schedule {name} needs {amount}{' and '.join(one_of)}", f"for example {example}", False
    end = given.get("lr_end")
    if name == "polynomial" and _number(end) and end >= training.learning_rate:
        yield f"lr_end {end} is not below training.learning_rate {training.learning_rate}", "lower it", False


def _installed(package: str) -> bool:
    return find_spec(package) is not None


_PIP: Mapping[str, str] = {"optimi": "torch-optimi", "azureml": "azureml-core", "comet_ml": "comet-ml"}


def _how_to_get(package: str) -> str:
    return f"pip install {_PIP.get(package, package.replace('_', '-'))}"
