"""What a run leaves in its folder: description, state in checkpoints, the trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from posttrain.config.loading import dump_recipe
from posttrain.data.truncation import Ledger
from posttrain.errors import StateError
from posttrain.rollouts.weight_sync import PolicyWeights, whole_tensors
from posttrain.state.checkpoint import checkpoints
from posttrain.state.environment import environment
from posttrain.state.files import folder_atomic, write_json_atomic, write_text_atomic
from posttrain.tracking.transcript import Transcript
from posttrain.trainers.critic import leave_critic, take_critic
from posttrain.trainers.shell import RunParts, Shell

LOCK = ".run.lock"
LOGS = ("metrics.jsonl", "samples.jsonl")


def refuse_used_folder(run_dir: Path) -> None:
    """Raises:
    StateError: the folder holds a finished run or one that can be resumed.
    """
    if (run_dir / "model").exists() or checkpoints(run_dir / "checkpoints"):
        raise StateError(
            "this folder holds a finished or interrupted run",
            where=str(run_dir),
            hint="go on with --resume auto, or choose another `output`, or remove the folder",
        )


def forget_unfinished_start(run_dir: Path) -> None:
    """Remove the logs of a run that did not reach its first checkpoint."""
    for name in LOGS:
        (run_dir / name).unlink(missing_ok=True)


def describe(parts: RunParts, rows: Ledger, *, step: int | None, changed: Sequence[str]) -> None:
    """Write what the run is made of, and say it in one line.

    Args:
        parts: of the run.
        rows: what became of the rows.
        step: of the checkpoint it resumes from; None for a fresh start.
        changed: differences to the run that made the checkpoint.
    """
    if step is None or changed or not (parts.run_dir / "resolved.yaml").exists():
        write_text_atomic(parts.run_dir / "resolved.yaml", dump_recipe(parts.recipe))
        write_json_atomic(parts.run_dir / "environment.json", environment())
    write_json_atomic(parts.run_dir / "data.json", rows.to_dict())
    name, steps = parts.recipe.method.name, parts.plan.max_steps
    parts.tracker.message(f"{name}: {steps} steps into {parts.run_dir}; data: {rows.summary()}")
    for difference in changed:
        parts.tracker.message(f"changed since the checkpoint: {difference}")
    if step is not None:
        with (parts.run_dir / "resumes.jsonl").open("a", encoding="utf-8") as file:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"step": step, "time": now, "changed": list(changed)}) + "\n")


def rewind_logs(parts: RunParts, step: int) -> None:
    """Forget what was logged after the checkpoint of that step."""
    parts.tracker.rewind(step)
    Transcript(parts.run_dir / "samples.jsonl").rewind(step)


def save_model(shell: Shell, tokenizer: PreTrainedTokenizerBase) -> None:
    """The trained weights in `model`; with an adapter, the merged model there and the adapter in `adapter`. A value
    model stands in `critic`."""
    run_dir, adapted = shell.parts.run_dir, shell.parts.recipe.model.peft is not None
    main = shell.accelerator.is_main_process
    target = run_dir / ("adapter" if adapted else "model")
    with folder_atomic(target) if main else nullcontext(target) as folder:
        shell.save_model(str(folder))
        if main:  # a pickle of the Trainer's arguments; resolved.yaml says the same
            (folder / "training_args.bin").unlink(missing_ok=True)
    critic = take_critic(shell) if shell.method.needs.critic else None
    # Gathered by all ranks: what DeepSpeed saves of a run with an adapter lacks the frozen tensors.
    state = {} if critic is None else {name: tensor.cpu() for name, tensor in whole_tensors(critic)}
    if adapted:
        weights = PolicyWeights(shell.accelerator.unwrap_model(shell.model), shell.accelerator)
        merged = {name: tensor.cpu() for name, tensor in weights.named_tensors()}  # all ranks gather what is sharded
        if main:
            with folder_atomic(run_dir / "model") as folder:
                weights.policy.save_pretrained(folder, state_dict=merged, safe_serialization=True)
                tokenizer.save_pretrained(folder)
    if main and critic is not None:
        leave_critic(critic, state, target, run_dir / "model", run_dir / "critic", tokenizer)
    shell.accelerator.wait_for_everyone()
