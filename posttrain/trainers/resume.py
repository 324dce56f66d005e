"""Where a run begins, fresh or from a checkpoint; posttrain's part of a checkpoint, and putting it back.

Reading order: `begin` before anything is loaded, `same_contents` after loading, `restore` before the first step,
`restore_loop` once the Trainer's loop has set itself up. `state_of` is the counterpart of the last two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from posttrain.config.schema import Recipe
from posttrain.errors import StateError
from posttrain.state.checkpoint import (
    checkpoint_step,
    checkpoints,
    find_checkpoint,
    read_state,
    refuse_foreign,
    retain,
    set_aside,
    sweep,
)
from posttrain.state.identity import Difference, check_names, refuse_changes, settings
from posttrain.trainers.guards import NonfiniteGuard
from posttrain.trainers.learning_check import LearningCheck
from posttrain.trainers.run_folder import forget_unfinished_start, refuse_used_folder, rewind_logs
from posttrain.trainers.shell import Shell


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run begins: anew, or at a checkpoint.

    Attributes:
        checkpoint: to resume from; None for a fresh start.
        state: its `posttrain.json`; empty for a fresh start.
        allowed: keys that the user lets change.
        changed: differences to the run that made the checkpoint, all of them allowed.
        notes: lines for the user.
    """

    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    changed: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()


def begin(
    recipe: Recipe, run_dir: Path, resume: str | None, allowed: Sequence[str], world_size: int, *, trust: bool = False
) -> ResumePoint:
    """Decide where the run begins, by the run folder, the recipe, packages and ranks. Needs the folder's lock.

    Raises:
        StateError: the folder holds another run, checkpoints are damaged, or something changed that may not.
    """
    folder = run_dir / "checkpoints"
    sweep(folder)
    now = settings(recipe, world_size)
    check_names(allowed, now)
    found = None if resume is None else find_checkpoint(folder, resume)
    if found is None or found.checkpoint is None:
        if resume is not None and (run_dir / "model").exists():
            raise StateError("the run in this folder is finished and kept no checkpoint", where=str(run_dir))
        refuse_used_folder(run_dir)
        forget_unfinished_start(run_dir)
        note = f"no checkpoint in {folder} to resume from: starting from the beginning"
        return ResumePoint(notes=() if resume is None else (note,))
    if found.checkpoint.resolve().parent != folder.resolve():
        refuse_used_folder(run_dir)
    if not trust:
        refuse_foreign(found.checkpoint)
    state = read_state(found.checkpoint)
    where = str(found.checkpoint)
    changed = refuse_changes(state["made_by"], now, allowed, where=where)
    _check_length(recipe, state["step"], where)
    notes = [f"passed over {path}: {reason}" for path, reason in found.damaged.items()]
    notes.append(f"resuming from {found.checkpoint}")
    return ResumePoint(found.checkpoint, state, tuple(allowed), tuple(changed), tuple(notes))


def _check_length(recipe: Recipe, step: int, where: str) -> None:
    wanted = recipe.training.max_steps
    if wanted is not None and step > wanted:
        raise StateError(
            f"the checkpoint is at step {step}, beyond training.max_steps {wanted}",
            where=where,
            hint="raise training.max_steps, or resume from an earlier checkpoint by its path",
        )


def same_contents(start: ResumePoint, contents: dict[str, Any]) -> ResumePoint:
    """Compare what was loaded with what the checkpoint was made from.

    Raises:
        StateError: it differs, and that was not allowed.
    """
    if start.checkpoint is None:
        return start
    changed = refuse_changes(start.state["made_by"], contents, start.allowed, where=str(start.checkpoint))
    return replace(start, changed=(*start.changed, *changed))


# -------------------------------------------------------------------------------------------------------------- state


def state_of(shell: Shell, guard: NonfiniteGuard, check: LearningCheck, made_by: dict[str, Any]) -> dict[str, Any]:
    """posttrain's own part of a checkpoint; JSON values. Called on all ranks.

    Data order and draws need no state (see `order` and `rollouts.sampling`).
    """
    ledger = shell.ledger.state_dict()
    since_log = {"means": shell.means.state_dict(), "loss": shell.loss_since_log(), "tokens": ledger["pending"]}
    return {
        "made_by": made_by,
        "method": shell.method.state_dict(),
        "ledger": ledger,
        "guard": guard.state_dict(),
        "learning_check": check.done,
        "since_log": gather_object([since_log]),
    }


def restore(shell: Shell, start: ResumePoint, guard: NonfiniteGuard, check: LearningCheck) -> None:
    """Put `state_of` back, and forget what came after the checkpoint."""
    parts, state = shell.parts, start.state
    shell.method.load_state_dict(state["method"])
    guard.load_state_dict(state["guard"])
    check.done = state["learning_check"]
    since_log = _of_this_rank(shell, state["since_log"])
    shell.ledger.load_state_dict(state["ledger"] | {"pending": since_log["tokens"]})
    shell.means.load_state_dict(since_log["means"])
    assert start.checkpoint is not None  # there is a state to put back
    shell.load_files(start.checkpoint)
    if not shell.accelerator.is_main_process:
        return
    rewind_logs(parts, state["step"])
    for path in checkpoints(parts.run_dir / "checkpoints"):
        if checkpoint_step(path) > state["step"]:
            parts.tracker.message(f"{path.name} is ahead of this run and was moved to {set_aside(path)}")
    # A run that was killed between a checkpoint and this leaves one too many.
    retain(parts.run_dir / "checkpoints", parts.recipe.training.save_total_limit)


def restore_loop(shell: Shell, start: ResumePoint) -> None:
    """What the Trainer's loop forgets or takes from the checkpoint although the recipe says otherwise now."""
    shell.restore_loss(_of_this_rank(shell, start.state["since_log"])["loss"])
    if any(difference.key.startswith("training.") for difference in start.changed):
        _set_hyperparameters(shell)


def _of_this_rank(shell: Shell, since_log: list[dict[str, Any]]) -> dict[str, Any]:
    """This rank's sums. Under another number of ranks the main one takes what all had."""
    rank, ranks = shell.rank, shell.world
    if len(since_log) == ranks:
        return since_log[rank]
    step = since_log[0]["loss"]["step"]
    loss = sum(part["loss"]["loss"] for part in since_log) / len(since_log)  # log entries have the mean over ranks
    tokens = {kind: 0 for kind in since_log[0]["tokens"]}
    means = type(shell.means)()
    if rank == 0:
        for part in since_log:
            means.merge(part["means"])
            tokens = {kind: tokens[kind] + part["tokens"][kind] for kind in tokens}
    return {"means": means.state_dict(), "loss": {"loss": loss, "step": step}, "tokens": tokens}


def _set_hyperparameters(shell: Shell) -> None:
    """A loaded optimizer brings the learning rate, decay and betas it was saved with; the recipe's go first."""
    _, arguments = shell.get_optimizer_cls_and_kwargs(shell.args)
    for group in shell.optimizer.param_groups:
        group.update({name: arguments[name] for name in arguments if name in group and name != "lr"})
        if group["weight_decay"] > 0 or group is shell.optimizer.param_groups[0]:  # the others are biases and norms
            group["weight_decay"] = shell.args.weight_decay
        group["initial_lr"] = shell.args.learning_rate * group.get("lr_factor", 1.0)
    scheduler = shell.lr_scheduler
    scheduler.base_lrs = [group["initial_lr"] for group in shell.optimizer.param_groups]
    rates = [
        base * share(scheduler.last_epoch) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(shell.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate if not isinstance(group["lr"], torch.Tensor) else group["lr"].fill_(rate)
    scheduler._last_lr = rates
