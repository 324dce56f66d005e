"""What a run leaves in its folder: description, state in checkpoints, the trained model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.config.loading import dump_recipe
from posttrain.data.truncation import Ledger
from posttrain.errors import StateError
from posttrain.state.checkpoint import read_state
from posttrain.state.environment import environment
from posttrain.state.files import folder_atomic, write_json_atomic, write_text_atomic
from posttrain.tracking.transcript import Transcript
from posttrain.trainers.shell import RunParts, Shell

LOGS = ("metrics.jsonl", "samples.jsonl")


def refuse_used_folder(run_dir: Path) -> None:
    """Raises:
    StateError: the folder holds a finished run or one that can be resumed.
    """
    if (run_dir / "model").exists() or any((run_dir / "checkpoints").glob("checkpoint-*")):
        raise StateError(
            "this folder holds a finished or interrupted run",
            where=str(run_dir),
            hint="go on with --resume auto, or choose another `output`, or remove the folder",
        )


def forget_unfinished_start(run_dir: Path) -> None:
    """Remove the logs of a run that did not reach its first checkpoint."""
    for name in LOGS:
        (run_dir / name).unlink(missing_ok=True)


def describe(parts: RunParts, rows: Ledger, *, fresh: bool) -> None:
    """Write what the run is made of, and say it in one line."""
    if fresh:
        write_text_atomic(parts.run_dir / "resolved.yaml", dump_recipe(parts.recipe))
        write_json_atomic(parts.run_dir / "environment.json", environment())
    write_json_atomic(parts.run_dir / "data.json", rows.to_dict())
    name, steps = parts.recipe.method.name, parts.plan.max_steps
    parts.tracker.message(f"{name}: {steps} steps into {parts.run_dir}; data: {rows.summary()}")


def state_of(parts: RunParts) -> dict[str, Any]:
    """posttrain's own part of a checkpoint; JSON values. Data order and draws need no state (see `order`)."""
    return {
        "method": parts.method.state_dict(),
        "ledger": parts.ledger.state_dict(),
        "world_size": parts.plan.world_size,
    }


def restore(checkpoint: Path, parts: RunParts, *, main: bool) -> None:
    """Put `state_of` back, and forget what was logged after the checkpoint."""
    state = read_state(checkpoint)
    parts.method.load_state_dict(state["method"])
    parts.ledger.load_state_dict(state["ledger"])
    if main:
        parts.tracker.rewind(state["step"])
        Transcript(parts.run_dir / "samples.jsonl").rewind(state["step"])
        parts.tracker.message(f"resumed from {checkpoint}")


def save_model(shell: Shell, tokenizer: PreTrainedTokenizerBase) -> None:
    """The trained weights in `model`; with an adapter, the merged model there and the adapter in `adapter`."""
    run_dir, adapted = shell.parts.run_dir, shell.parts.recipe.model.peft is not None
    main = shell.accelerator.is_main_process
    target = run_dir / ("adapter" if adapted else "model")
    with folder_atomic(target) if main else nullcontext(target) as folder:
        shell.save_model(str(folder))
        if main:  # a pickle of the Trainer's arguments; resolved.yaml says the same
            (folder / "training_args.bin").unlink(missing_ok=True)
    if main and adapted:
        merged = shell.accelerator.unwrap_model(shell.model).merge_and_unload()
        with folder_atomic(run_dir / "model") as folder:
            merged.save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
    shell.accelerator.wait_for_everyone()
