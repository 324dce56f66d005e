"""What a run leaves in its folder beside the trained model (`saving`): description, and state in checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from posttrain.config.loading import dump_recipe
from posttrain.errors import StateError
from posttrain.safe_files import open_plain, write_json_atomic, write_text_atomic
from posttrain.state.checkpoint import checkpoints
from posttrain.state.environment import environment
from posttrain.tracking.transcript import Transcript
from posttrain.trainers.rows import Prepared
from posttrain.trainers.shell import RunParts
from posttrain.trainers.token_values import FILE

LOCK = ".run.lock"
TRANSCRIPTS = ("samples.jsonl", FILE)
LOGS = ("metrics.jsonl", *TRANSCRIPTS)

VERIFIER_LOG = "verifier.log"
"""What reward functions of the user's own print."""

WORLD_LOG = "environment.log"
"""What environments print, and what they raise."""


def refuse_used_folder(run_dir: Path) -> None:
    """Refuse a folder that holds another run.

    Raises:
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


@contextmanager
def gone_if_unused(run_dir: Path) -> Iterator[None]:
    """Remove the folder again if the block made it and fails before there is anything in it but empty files, such as
    the lock that was let go."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        # Empty folders are the Trainer's, for checkpoints to come.
        left = [path for path in run_dir.rglob("*") if not path.is_dir() and path.lstat().st_size > 0]
        if made and not left:
            shutil.rmtree(run_dir, ignore_errors=True)
            for folder in made[1:]:
                with suppress(OSError):  # another run may have begun beside this one
                    folder.rmdir()
        raise


def describe(parts: RunParts, prepared: Prepared, *, step: int | None, changed: Sequence[str]) -> None:
    """Write what the run is made of, and say it in one line.

    Args:
        parts: of the run.
        prepared: its rows.
        step: of the checkpoint it resumes from; None for a fresh start.
        changed: differences to the run that made the checkpoint.
    """
    if step is None or changed or not (parts.run_dir / "resolved.yaml").exists():
        write_text_atomic(parts.run_dir / "resolved.yaml", dump_recipe(parts.recipe))
        write_json_atomic(parts.run_dir / "environment.json", environment())
    write_json_atomic(parts.run_dir / "data.json", prepared.ledger.to_dict())
    name, steps = parts.recipe.method.name, parts.plan.max_steps
    first, *further = prepared.lines()
    parts.tracker.message(f"{name}: {steps} steps into {parts.run_dir}; data: {first}")
    for line in further:
        parts.tracker.message(line)
    for difference in changed:
        parts.tracker.message(f"changed since the checkpoint: {difference}")
    if step is not None:
        with open(parts.run_dir / "resumes.jsonl", "a", encoding="utf-8", opener=open_plain) as file:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"step": step, "time": now, "changed": list(changed)}) + "\n")


def rewind_logs(parts: RunParts, step: int) -> None:
    """Forget what was logged after the checkpoint of that step."""
    parts.tracker.rewind(step)
    for name in TRANSCRIPTS:
        Transcript(parts.run_dir / name).rewind(step)
