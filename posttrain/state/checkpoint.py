"""Checkpoints of a run: which are complete, which to resume from, and what they hold beside the Trainer's own files.

The Trainer writes model, optimizer, scheduler and RNG; `posttrain.json` is written after them and makes the checkpoint
complete. A folder without it is never resumed from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from posttrain.errors import StateError
from posttrain.state.files import write_json_atomic

STATE_FILE = "posttrain.json"
FORMAT = 1


def checkpoint_step(folder: Path) -> int | None:
    """The optimizer step in a checkpoint folder's name, or None for another folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match.group(1)) if match else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(checkpoint_step(path), path) for path in folder.iterdir() if (path / STATE_FILE).is_file()]
    return [path for step, path in sorted((s, p) for s, p in found if s is not None)]


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Complete a checkpoint. `state` holds JSON values only."""
    write_json_atomic(checkpoint / STATE_FILE, {"format": FORMAT, **state})


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a complete checkpoint.

    Raises:
        StateError: incomplete, or of another format.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise StateError(
            "this checkpoint is incomplete: it was being written when the run ended",
            where=str(checkpoint),
            hint="use `--resume auto` for the newest complete one",
        )
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise StateError(f"state of format {state.get('format')}, this version reads {FORMAT}", where=str(path))
    return state


def find_checkpoint(folder: Path, resume: str) -> Path:
    """The checkpoint that `--resume` names: `auto` is the newest complete one under `folder`.

    Raises:
        StateError: there is none, or the named one is incomplete.
    """
    if resume != "auto":
        read_state(Path(resume))
        return Path(resume)
    complete = complete_checkpoints(folder)
    if not complete:
        raise StateError(
            "no complete checkpoint to resume from", where=str(folder), hint="leave out --resume to start the run"
        )
    return complete[-1]
