"""Rebuild the batch of one optimizer step of a run, and see what each row adds to its loss.

Order, draws and rollouts are functions of the seed, so the batch follows from the recipe and the weights before that
step. Those come from the nearest checkpoint before it, or the model the run started from, by taking the steps between
once more, in a folder that is thrown away. The run itself is only read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.config.loading import load_recipe
from posttrain.config.relative_paths import from_folder, started_in
from posttrain.config.schema import Recipe
from posttrain.errors import StateError
from posttrain.methods import CONFIGS
from posttrain.models.collate import Tensors
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.safe_files import refuse_links_out
from posttrain.state.checkpoint import checkpoint_step, checkpoints, damage, read_state
from posttrain.state.identity import compare
from posttrain.tracking.events import FILE_NAME, metrics_of, read_events
from posttrain.trainers.callbacks import AtStart
from posttrain.trainers.guards import NonfiniteGuard
from posttrain.trainers.learning_check import LearningCheck
from posttrain.trainers.resume import ResumePoint, restore, restore_loop
from posttrain.trainers.run import built_aside
from posttrain.trainers.shell import Shell


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One token sequence of a row.

    Attributes:
        role: `chosen`, `rejected` and the like; empty where a row is one sequence.
        tokens: without padding.
        trained: tokens under the loss mask.
        pieces: (text, whether it is under the mask), in order.
        logp: mean log-prob of the trained tokens under the policy; None without any.
        ref_logp: the same under the reference; None without one.
    """

    role: str
    tokens: int
    trained: int
    pieces: list[tuple[str, bool]]
    logp: float | None
    ref_logp: float | None


@dataclass(frozen=True, slots=True)
class RebuiltRow:
    """One row of a step that was computed again.

    Attributes:
        micro_batch: number, from 0.
        row: number within it, from 0.
        advantage: one number or one per token; None for supervised rows.
        values: numbers that the row carries.
        loss: term -> what the row adds to the loss of the step.
        sequences: its token sequences.
    """

    micro_batch: int
    row: int
    advantage: float | list[float] | None
    values: dict[str, Any]
    loss: dict[str, float]
    sequences: list[TokenSequence]


@dataclass(frozen=True, slots=True)
class RebuiltStep:
    """A step that was computed again.

    Attributes:
        step: optimizer step, from 1, as in metrics.jsonl.
        checkpoint: that the weights come from; None for the start of the run.
        steps_again: steps that were taken once more.
        loss: of the step, from its rows.
        logged: what the run logged for the step; empty if it did not get there.
        differences: between what made the checkpoint and what is here now.
        rows: of the batch.
    """

    step: int
    checkpoint: Path | None
    steps_again: int
    loss: float
    logged: dict[str, float]
    differences: list[str] = field(default_factory=list)
    rows: list[RebuiltRow] = field(default_factory=list)


class _Reached(Exception):
    """The step to replay is about to begin; leaves the Trainer's loop."""


class _StopBefore(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise _Reached


def rebuild_step(run_dir: Path, step: int) -> RebuiltStep:
    """Rebuild the batch of a step, on one rank.

    Args:
        run_dir: folder of a run.
        step: optimizer step, from 1, as in metrics.jsonl.

    Raises:
        StateError: no run there, or no such step.
        PosttrainError: as for training.
    """
    recipe = _recipe(run_dir)
    checkpoint = _nearest(run_dir / "checkpoints", step - 1)
    state = {} if checkpoint is None else read_state(checkpoint)
    with built_aside(recipe) as built:
        shell = built.shell
        if not 1 <= step <= shell.parts.plan.max_steps:
            raise StateError(f"the run has steps 1 to {shell.parts.plan.max_steps}, not {step}", where=str(run_dir))
        _advance(shell, ResumePoint(checkpoint, state), step - 1)
        rows = list(_rows(shell))
    own = ("output", "tracking", "training.save_steps", "training.report_to")
    differences = [d for d in compare(state.get("made_by", {}), built.made_by) if not d.key.startswith(own)]
    return RebuiltStep(
        step=step,
        checkpoint=checkpoint,
        steps_again=step - 1 - (0 if checkpoint is None else checkpoint_step(checkpoint)),
        loss=sum(sum(row.loss.values()) for row in rows),
        logged=_logged(run_dir, step),
        differences=[str(difference) for difference in differences] if state else [],
        rows=rows,
    )


def _recipe(run_dir: Path) -> Recipe:
    path = run_dir / "resolved.yaml"
    if not path.is_file():
        raise StateError("no resolved.yaml here, so no run", where=str(run_dir), hint="give the output folder of a run")
    refuse_links_out(run_dir)
    recipe = load_recipe(path, [], CONFIGS)
    return from_folder(recipe, started_in(run_dir))


def _nearest(folder: Path, most: int) -> Path | None:
    """The newest undamaged checkpoint of at most that many steps."""
    usable = (path for path in reversed(checkpoints(folder)) if checkpoint_step(path) <= most)
    return next((path for path in usable if damage(path) is None), None)


def _logged(run_dir: Path, step: int) -> dict[str, float]:
    path = run_dir / FILE_NAME
    events = read_events(path) if path.exists() else []
    found = [metrics_of(event) for event in events if event["step"] == step]
    return next((metrics for metrics in found if "loss" in metrics), {})


def _advance(shell: Shell, start: ResumePoint, steps: int) -> None:
    """Train until that many steps are done and the batch of the next one is built."""
    guard, check = NonfiniteGuard(shell, shell.parts.recipe.guards.skipped_updates), LearningCheck(lambda line: None)
    if start.checkpoint is not None:
        restore(shell, start, guard, check)
        shell.add_callback(AtStart(lambda: restore_loop(shell, start)))
    for callback in (guard, check, _StopBefore(steps)):
        shell.add_callback(callback)
    try:
        shell.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
    except _Reached:
        return


# --------------------------------------------------------------------------------------------------------------- rows


@torch.no_grad()
def _rows(shell: Shell) -> Iterator[RebuiltRow]:
    """All rows of the step that the shell stands before."""
    device = shell.accelerator.device
    counts = shell.global_counts(shell.step_inputs, device)
    shell.model.train()
    for number, tensors in enumerate(shell.step_inputs):
        inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
        batch = shell.method_batch(inputs, shell.model)
        for row, (part, values, sequences) in enumerate(rows_of(batch, inputs)):
            terms = shell.method.loss(part)
            loss = {term: float(s.value / counts[term].clamp(min=1)) for term, s in terms.items()}
            texts = [_sequence(shell, role, ids, tokens) for role, ids, tokens in sequences]
            yield RebuiltRow(number, row, advantage_of(part), values, loss, texts)


Unit = tuple[TokenBatch | PreferenceBatch, dict[str, Any], list[tuple[str, Tensor, TokenBatch]]]
"""One row as its method takes it, the numbers it carries, and its sequences: role, (T,) ids, a batch of one."""


def rows_of(batch: TokenBatch | PreferenceBatch, inputs: Tensors) -> Iterator[Unit]:
    """The rows of a micro-batch, one by one."""
    yield from _preference_units(batch, inputs) if isinstance(batch, PreferenceBatch) else _units(batch, inputs)


def _units(batch: TokenBatch, inputs: Tensors) -> Iterator[Unit]:
    for i in range(len(batch.mask)):
        one = batch.rows(slice(i, i + 1))
        yield one, {}, [("", _unpadded(inputs, i), one)]


def _preference_units(batch: PreferenceBatch, inputs: Tensors) -> Iterator[Unit]:
    size = len(next(iter(batch.responses.values())).mask) if batch.responses else 0
    for i in range(size):
        one = replace(batch.rows(slice(i, i + 1)), samples=None)
        sequences = [
            (role, _unpadded(inputs, number * size + i), tokens)
            for number, (role, tokens) in enumerate(one.responses.items())
        ]
        yield one, {name: value[0].tolist() for name, value in one.values.items()}, sequences
    drawn = 0 if batch.samples is None else len(batch.samples.mask)
    for i in range(drawn):
        sample = batch.samples.rows(slice(i, i + 1))
        yield PreferenceBatch({}, {}, sample), {}, [("sample", _unpadded(inputs, i, "samples/"), sample)]


def _unpadded(inputs: Tensors, row: int, prefix: str = "") -> Tensor:
    return inputs[f"{prefix}ids"][row][inputs[f"{prefix}attention_mask"][row].bool()]


def advantage_of(part: TokenBatch | PreferenceBatch) -> float | list[float] | None:
    """Of a row: one number or one per token."""
    tokens = part.samples if isinstance(part, PreferenceBatch) else part
    return None if tokens is None or tokens.advantages is None else tokens.advantages[0].tolist()


def _sequence(shell: Shell, role: str, ids: Tensor, tokens: TokenBatch) -> TokenSequence:
    mask = tokens.mask[0]
    pieces: list[tuple[str, bool]] = []
    start, length, flags = 0, len(ids), mask.tolist()
    for end in range(1, length + 1):
        if end == length or flags[end] != flags[start]:
            pieces.append((shell.parts.renderer.shown(ids[start:end].tolist()), flags[start]))
            start = end
    trained = int(mask.sum())

    def mean(logps: Tensor | None) -> float | None:
        return None if logps is None or trained == 0 else float(logps[0][mask].mean())

    return TokenSequence(role, length, trained, pieces, mean(tokens.logps), mean(tokens.ref_logps))
