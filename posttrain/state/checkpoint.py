"""Checkpoints of a run: written beside, sealed with checksums, renamed; and which one to resume from.

The Trainer fills a folder under `checkpoints/.saving`, which nothing else looks at. `commit` adds `posttrain.json`
(posttrain's own state, and size and SHA-256 of every file), syncs all of it to disk and renames the folder to
`checkpoints/checkpoint-N`. So a folder of that name was complete when it appeared, and damage after that is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.bounded_files import read_bytes
from posttrain.errors import StateError
from posttrain.safe_files import clear, sync_folder, write_json_atomic
from posttrain.state.signature import is_signed, secret_file, sign, unlisted, unpickled

STATE_FILE = "posttrain.json"
FORMAT = 3
STAGING = ".saving"
SET_ASIDE = "set-aside"
_REMOVING = ".removing-"
_PICKLES = ("training_args.bin",)
"""Written by the Trainer, read by nobody: resolved.yaml says the same."""


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint, and whether it is whole.

    Attributes:
        checkpoint: the one to resume from; None if the run folder has none at all.
        damaged: newer ones that were passed over, with the reason.
    """

    checkpoint: Path | None
    damaged: dict[Path, str] = field(default_factory=dict)


def checkpoint_step(folder: Path) -> int | None:
    """The optimizer step in a checkpoint folder's name, or None for another folder."""
    match = re.fullmatch(r"checkpoint-(\d{1,18})", folder.name, re.ASCII)
    return int(match.group(1)) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """Folders under `folder` that are named like a checkpoint, whatever is in them; oldest first."""
    if not folder.is_dir():
        return []
    found = [(checkpoint_step(path), path) for path in folder.iterdir() if path.is_dir()]
    return [path for step, path in sorted((s, p) for s, p in found if s is not None)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under `folder` whose files are all there in full length, oldest first. Contents are not read."""
    return [path for path in checkpoints(folder) if damage(path, contents=False) is None]


# ---------------------------------------------------------------------------------------------------------- writing


def commit(staged: Path, target: Path, state: dict[str, Any]) -> None:
    """Seal a filled folder and give it its name. After a crash at any point there is no half of it under that name.

    Args:
        staged: folder on the same file system as `target`.
        target: `checkpoint-N`; one that is there is set aside.
        state: posttrain's own part; JSON values.

    Raises:
        OSError: the disk is full or fails; `target` is not touched.
    """
    for name in _PICKLES:
        (staged / name).unlink(missing_ok=True)
    sealed = {"format": FORMAT, **state, "files": _manifest(staged)}
    sealed["signature"] = sign(_seal(sealed))
    write_json_atomic(staged / STATE_FILE, sealed | {"seal": _seal(sealed)})
    for path in sorted(path for path in staged.rglob("*") if path.is_dir()):
        sync_folder(path)
    sync_folder(staged)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        set_aside(target)
    staged.rename(target)
    sync_folder(target.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint such that a crash on the way leaves no half of it under its name."""
    if not checkpoint.exists():
        return
    going = checkpoint.with_name(f"{_REMOVING}{checkpoint.name}")
    clear(going)
    checkpoint.rename(going)
    clear(going)


def sweep(folder: Path) -> None:
    """Delete what earlier processes left half-written or half-deleted under `folder`."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name == STAGING or path.name.startswith(_REMOVING):
                clear(path)


def retain(folder: Path, limit: int | None) -> list[Path]:
    """Delete the oldest complete checkpoints beyond `limit`; damaged ones neither count nor are touched.

    Returns:
        The deleted ones.
    """
    if limit is None:
        return []
    old = complete_checkpoints(folder)[: -max(limit, 1)]
    for path in old:
        remove(path)
    return old


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint where no resume finds it; returns its new place."""
    folder = checkpoint.parent / SET_ASIDE
    folder.mkdir(exist_ok=True)
    target, number = folder / checkpoint.name, 1
    while target.exists():
        number += 1
        target = folder / f"{checkpoint.name}-{number}"
    checkpoint.rename(target)
    return target


# ---------------------------------------------------------------------------------------------------------- reading


def read_state(checkpoint: Path) -> dict[str, Any]:
    """posttrain's own part of a checkpoint. Says nothing about the other files: see `damage`.

    Raises:
        StateError: missing, damaged, or of another format.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise StateError(
            f"this is no complete checkpoint: it has no {STATE_FILE}",
            where=str(checkpoint),
            hint="use `--resume auto` for the newest complete one",
        )
    try:
        state = json.loads(read_bytes(path, StateError))
    except (ValueError, RecursionError) as error:
        raise StateError("damaged: not readable as JSON", where=str(path)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise StateError(f"state of format {found!r}; this version reads format {FORMAT}", where=str(path))
    seal = state.pop("seal", None)
    if seal != _seal(state):
        raise StateError("damaged: the content does not match its checksum", where=str(path))
    state.pop("signature", None)
    if not _well_formed(state):
        raise StateError("damaged: its step or its list of files is not one", where=str(path))
    return state


def _well_formed(state: dict[str, Any]) -> bool:
    """Whether step and manifest have the form that `commit` writes; a checksum can be made for any text."""
    files, step = state.get("files"), state.get("step")
    if not isinstance(step, int) or not isinstance(state.get("made_by", {}), dict):
        return False
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        checkpoint: its folder.
        contents: also compare checksums; without it only names and sizes.
    """
    try:
        state = read_state(checkpoint)
        missing = [name for name in state["files"] if not _inside(checkpoint, name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        for name, entry in state["files"].items():
            size = _inside(checkpoint, name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
        if contents:
            for name, digest in zip(state["files"], _digests(checkpoint, list(state["files"])), strict=True):
                if digest != state["files"][name]["sha256"]:
                    return f"the content of {name} does not match its checksum"
    except StateError as error:
        return error.what
    except OSError as error:
        return f"cannot be read: {error.strerror} ({error.filename})"
    return None


def find_checkpoint(folder: Path, resume: str) -> Found:
    """The checkpoint that `--resume` names.

    Args:
        folder: `checkpoints` of the run.
        resume: `auto` for the newest undamaged one under `folder`, or a checkpoint folder.

    Raises:
        StateError: the named one is incomplete or damaged, or all that are there.
    """
    if resume != "auto":
        return Found(_undamaged(Path(resume), folder))
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return Found(path, damaged)
        damaged[path] = reason
    if damaged:
        raise StateError(
            "every checkpoint is damaged: " + "; ".join(f"{path.name}: {why}" for path, why in damaged.items()),
            where=str(folder),
            hint="to start from the beginning, move the folder away and leave out --resume",
        )
    return Found(None)


def _undamaged(checkpoint: Path, folder: Path) -> Path:
    reason = damage(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if reason is None and checkpoint_step(checkpoint) is None:
        reason = "its name is not checkpoint-<step>"
    if reason is not None:
        complete = [path.name for path in complete_checkpoints(folder)]
        raise StateError(
            f"cannot resume from this checkpoint: {reason}",
            where=str(checkpoint),
            hint=f"complete ones in {folder}: {', '.join(complete) or 'none'}; --resume auto takes the newest",
        )
    return checkpoint


def refuse_foreign(checkpoint: Path) -> None:
    """Refuse a checkpoint whose loading may run code, unless this user's own runs wrote it. See `signature`.

    Raises:
        StateError: it is signed by nobody or somebody else, or has further such files than were signed.
    """
    names = unpickled(checkpoint)
    if not names:
        return
    state = read_state(checkpoint)
    written = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")).get("signature")
    added = unlisted(names, state["files"])
    if added:
        problem = f"{added[0]} was added to it"
    elif not is_signed(_seal(state), written):
        problem = "it was not written by a run of this user on this machine"
    else:
        return
    raise StateError(
        f"{problem}, and loading {names[0]} runs whatever code it names",
        where=str(checkpoint),
        hint="if you trust whoever wrote it: --trust-checkpoint; signatures are made with the secret in "
        f"{secret_file()}, which the jobs of a run must share (XDG_STATE_HOME)",
    )


# --------------------------------------------------------------------------------------------------------- checksums


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the state; each is synced to disk on the way."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != STATE_FILE]
    digests = _digests(folder, names, sync=True)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }


def _digests(folder: Path, names: list[str], *, sync: bool = False) -> list[str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as stream:
            if sync:
                os.fsync(stream.fileno())
            return hashlib.file_digest(stream, "sha256").hexdigest()

    # Hashing releases the interpreter's lock, so files of large models are read side by side.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(digest, names))


def _seal(state: dict[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """A file of the checkpoint; a name that leads out of it is damage."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise StateError(f"the manifest names a file outside of it: {name!r}", where=str(folder))
    return folder / name
