"""What a method must keep in a real run of a tiny model: data, rollouts, verifiers, TRL's trainer, checkpoint files.

As in `contract.loss`, each check says in its docstring's first sentence what it shows, and raises `Broken`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.config import plugins
from posttrain.config.loading import build_recipe
from posttrain.config.locations import Locations
from posttrain.contract.loss import hold
from posttrain.contract.recipes import tiny_recipe
from posttrain.methods import CONFIGS
from posttrain.trainers.callbacks import CALLBACKS
from posttrain.trainers.run import train
from posttrain.trainers.token_values import FILE

CLOCK = (
    "time",
    "step_seconds",
    "rollout_seconds",
    "verify_seconds",
    "environment_seconds",
    "tokens_per_second",
    "wall_seconds",
    "cpu_seconds",
    "cpu_seconds_total",
)
"""Metrics that two equal runs differ in."""

DESCENT = {"training.optim": "sgd", "training.learning_rate": 0.5, "training.max_grad_norm": 0.0}
"""Plain gradient descent: Adam would blow the rounding of tiny gradients up to the size of its step."""

LAUNCH_LIMIT = 600
"""Seconds for a run on two ranks."""


@dataclass(frozen=True, slots=True)
class Case:
    """A method as it is checked.

    Attributes:
        section: its parameters, with `name`.
        folder: for everything that the checks write.
        model: the policy that the runs start from.
    """

    section: Mapping[str, Any]
    folder: Path
    model: Path

    def recipe(self, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe whose run is the folder of that name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        given = {"output": str(self.folder / name), "plugins": list(plugins.loaded)}
        return tiny_recipe(self.section, self.folder, self.model, {**given, **changes})

    def run(self, name: str, changes: Mapping[str, Any], resume: str | None = None) -> Path:
        """Train it; the run's folder."""
        return train(build_recipe(self.recipe(name, changes), Locations("contract"), CONFIGS), resume=resume).run_dir


ShellCheck = Callable[[Case], None]


def any_micro_batch_trains_the_same_model(case: Case) -> None:
    """Any micro-batch trains the same model, and a step moves it."""
    whole = case.run("whole", {**DESCENT, "batch.micro_batch": 16})
    parts = case.run("parts", {**DESCENT, "batch.micro_batch": 4})
    same_model(whole, parts, case.model, 1e-3)


def resumed_equals_uninterrupted(case: Case) -> None:
    """A run that dies and is resumed equals one that was left alone, bit for bit."""
    steps = {"training.max_steps": 6, "training.save_steps": 2}
    with called(Draws):
        whole = case.run("untouched", steps)
        try:
            with called(_Dies):
                case.run("killed", steps)
        except _Died:
            pass
        resumed = case.run("killed", steps, resume="auto")
    same_run(whole, resumed)


def two_ranks_train_the_same_model(case: Case) -> None:
    """Two ranks train the model that one trains."""
    alone = case.run("alone", {**DESCENT, "batch.micro_batch": 4})
    file = case.folder / "ranks.yaml"
    file.write_text(yaml.safe_dump(case.recipe("ranks", {**DESCENT, "batch.micro_batch": 4})), encoding="utf-8")
    launched = launch(["-m", "posttrain", "train", str(file)])
    hold(launched.returncode == 0, f"two ranks do not train: {launched.stdout[-600:]}")
    same_model(alone, case.folder / "ranks", case.model, 1e-3)


CHECKS: tuple[ShellCheck, ...] = (any_micro_batch_trains_the_same_model, resumed_equals_uninterrupted)
"""Those that take seconds; `two_ranks_train_the_same_model` starts two processes."""


def launch(command: Sequence[str], ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """A command of Python on several ranks of this machine, which talk by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    return subprocess.run(
        [sys.executable, "-m", *torchrun, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_LIMIT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def weights(folder: Path) -> dict[str, Tensor]:
    """Of a model folder."""
    return load_file(folder / "model.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Of each step that a run logged, without those of the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows if "loss" in row]


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest one of any weight."""
    hold(one.keys() == other.keys(), "the two models have other weights")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def moved_from(start: Path, run: Path) -> float:
    """By how much a run moved the weights that it started from; a classifier has a new head beside them."""
    before, after = weights(start), weights(run / "model")
    hold(set(after) - set(before) <= {"score.weight"}, "the trained model has weights that the policy has not")
    return difference({name: after[name] for name in before}, before)


def same_model(one: Path, other: Path, start: Path, share: float, metric: float = 1e-3) -> None:
    """Two runs that did the same in different parts.

    Args:
        one, other: their folders.
        start: the model that both started from.
        share: of the distance moved, by which weights may differ.
        metric: relative difference of what is logged per step.

    Raises:
        Broken: they trained other models, or none.
    """
    moved = moved_from(start, one)
    hold(moved > 1e-4, f"training moved no weight by more than {moved:.1g}")
    apart = difference(weights(one / "model"), weights(other / "model"))
    hold(apart < share * max(moved, 0.1), f"weights differ by {apart:.2g}, and training moved them by {moved:.2g}")
    first, second = metrics(one), metrics(other)
    hold(len(first) == len(second), f"{len(first)} steps against {len(second)}")
    for row, beside in zip(first, second, strict=True):
        for name in ("loss", "grad_norm", "tokens_trained"):
            near = isclose(row[name], beside[name], rel_tol=metric, abs_tol=1e-5)
            hold(near, f"{name} of step {row['step']} is {row[name]:g} and {beside[name]:g}")


def same_run(one: Path, other: Path) -> None:
    """Two runs that must be the same, also in what `Draws` has drawn.

    Raises:
        Broken: weights, metrics, values of tokens or random numbers are not equal bit for bit.
    """
    left, right = weights(one / "model"), weights(other / "model")
    apart = difference(left, right)
    first, second = metrics(one), metrics(other)
    hold(len(first) == len(second), f"{len(first)} steps are logged, and {len(second)}")
    for row, beside in zip(first, second, strict=True):
        names = sorted(name for name in row.keys() | beside.keys() if str(row.get(name)) != str(beside.get(name)))
        hold(not names, f"step {row['step']} differs in {', '.join(names)}")
    hold(apart == 0, f"weights differ by {apart:.2g}")
    tokens = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (one / FILE, other / FILE)]
    hold(tokens[0] == tokens[1], f"{FILE} differs")
    draws, again = _drawn(one), _drawn(other)
    apart_in = [step for step in sorted(draws.keys() | again.keys()) if draws.get(step) != again.get(step)]
    hold(not apart_in, f"random numbers differ from step {apart_in[:1]} on")


@contextmanager
def called(callback: type[TrainerCallback]) -> Iterator[None]:
    """Runs within the block call it."""
    CALLBACKS.append(callback)
    try:
        yield
    finally:
        CALLBACKS.remove(callback)


DRAWN = "drawn.jsonl"


class Draws(TrainerCallback):
    """Writes down one number of each generator that a step may draw from, so that `same_run` sees where they stand.

    Data and samples are drawn by seed and step, so that most methods draw nothing else, and dropout draws all else.
    """

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        of_torch = [torch.rand(()), torch.rand((), device=args.device)]
        numbers = [random.random(), np.random.random(), *map(float, of_torch)]
        with (Path(args.output_dir).parent / DRAWN).open("a", encoding="utf-8") as file:
            file.write(json.dumps([state.global_step, numbers]) + "\n")


def _drawn(run: Path) -> dict[int, list[float]]:
    """By step; of one that was done twice, since the run had died, what was drawn at last."""
    file = run / DRAWN
    return dict(map(json.loads, file.read_text(encoding="utf-8").splitlines())) if file.exists() else {}


class _Died(BaseException):
    """Past every handler of errors, as SIGKILL is."""


class _Dies(TrainerCallback):
    """Ends a run in its third step, one after a checkpoint."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step == 3:
            raise _Died
        return control
