"""When a stage's result may be used again: the key of its inputs and the record beside its artefacts.

A stage folder holds `stage.started.json` from before the work begins and `stage.json` once it is complete. The second
is written last and by rename, so a stage that was killed at any point has none and is not done. See
docs/design/0002-pipelines.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from posttrain.bounded_files import read_json
from posttrain.errors import StateError
from posttrain.safe_files import refuse_others, write_json_atomic
from posttrain.state.identity import flatten

DONE, STARTED = "stage.json", "stage.started.json"
_ABSENT = "(none)"
_KEY = re.compile(r"@([0-9a-f]{8})[0-9a-f]{56}")


# ------------------------------------------------------------------------------------------------------------- keys


def key_of(inputs: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) over the canonical JSON of `inputs`: sorted keys, no white space."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of every file, with folders taken file by file; keys are the paths as given, in posix form."""
    hashes = {}
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    hashes[file.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the installed distributions.

    Raises:
        importlib.metadata.PackageNotFoundError: one of them is not installed.
    """
    return {package: importlib.metadata.version(package) for package in packages}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two inputs, one line each: `training.max_steps: 1000 -> 2000`."""
    before, after = flatten(old), flatten(new)
    lines = []
    for name in [*before, *(name for name in after if name not in before)]:
        first, second = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if first != second:
            lines.append(_difference(name, first, second))
    return lines


def _difference(name: str, old: str, new: str) -> str:
    group, _, rest = name.partition(".")
    if group == "files":
        change = "is no longer read" if new == _ABSENT else "is now read" if old == _ABSENT else "has other content"
        return f"file {rest} {change}"
    if group == "config":
        return _KEY.sub(r"@\1", f"{rest}: {old} -> {new}")
    if group == "versions":
        return f"version of {rest}: {old} -> {new}"
    return f"{name}: {old} -> {new}"


# ---------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage folder was made from.

    Attributes:
        stage: name of the stage.
        key: `key_of(inputs)`.
        inputs: kind, resolved config, file hashes, versions and code version.
        reads: earlier stage -> `run_id` of the execution whose artefacts this one read.
        run_id: a name for this execution.
        started: ISO time, UTC.
        finished: ISO time, UTC; None while it runs.
        artefacts: artefact name -> path relative to the stage folder; empty while it runs.
    """

    stage: str
    key: str
    inputs: dict[str, Any]
    reads: dict[str, str]
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: str = field(default_factory=lambda: _now())
    finished: str | None = None
    artefacts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a stage folder holds, compared with what the pipeline asks for.

    Attributes:
        state: `new` no folder; `done` complete and current; `interrupted` begun with the same inputs, not complete;
            `stale` made from other inputs.
        reasons: why it is stale, or what a complete stage has lost.
        record: what the folder says of itself; None when new.
    """

    state: Literal["new", "done", "interrupted", "stale"]
    reasons: Sequence[str] = ()
    record: StageRecord | None = None


def examine(folder: Path, wanted: StageRecord, artefacts: Mapping[str, str]) -> Standing:
    """Compare a stage folder with `wanted` (a fresh record with the current key and reads).

    Args:
        folder: the stage's folder, which need not exist.
        wanted: the record that a run of the stage would start with.
        artefacts: artefact name -> relative path, all of which a complete stage must have.

    Raises:
        StateError: as `read_records`.
    """
    done, record = read_records(folder)
    if record is None:
        return Standing("new")
    changed = differences(record.inputs, wanted.inputs)
    if not changed:
        again = [name for name, run_id in wanted.reads.items() if record.reads.get(name) != run_id]
        changed = [f"stage {name}, which it reads, was run again" for name in again]
    if changed:
        return Standing("stale", changed, record)
    if done is None:
        return Standing("interrupted", (), record)
    lost = [f"{name} ({folder / path}) is missing" for name, path in artefacts.items() if not (folder / path).exists()]
    return Standing("interrupted" if lost else "done", lost, record)


def read_records(folder: Path) -> tuple[StageRecord | None, StageRecord | None]:
    """The record of a complete stage, if it is one, and of whatever was begun last; both None in an empty folder.

    Raises:
        StateError: the folder holds files but no record, or one that cannot be read.
    """
    # hidden files do not count: one killed while it wrote its first record leaves only those
    if not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir()):
        return None, None
    done, started = _read(folder / DONE), _read(folder / STARTED)
    if done is None and started is None:
        raise StateError(
            "this folder holds files that no stage of a pipeline has written, and they are not overwritten",
            where=str(folder),
            hint="move it away, or give the pipeline another `output`",
        )
    return done, done or started


def mark_started(folder: Path, record: StageRecord) -> None:
    """Say what the work about to begin is made from; from here on the folder counts as incomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / STARTED, dataclasses.asdict(record))
    (folder / DONE).unlink(missing_ok=True)


def mark_done(folder: Path, record: StageRecord, artefacts: Mapping[str, str]) -> StageRecord:
    """Write `stage.json`, after all else; returns the complete record.

    Raises:
        FileNotFoundError: the stage did not write one of its artefacts (a defect of its kind).
    """
    for path in artefacts.values():
        if not (folder / path).exists():
            raise FileNotFoundError(f"stage {record.stage} ended without writing {folder / path}")
    complete = dataclasses.replace(record, finished=_now(), artefacts=dict(artefacts))
    write_json_atomic(folder / DONE, dataclasses.asdict(complete))
    (folder / STARTED).unlink(missing_ok=True)
    return complete


def move_aside(folder: Path, key: str) -> Path:
    """Rename a stage folder to `<name>.<first 8 digits of its key>`, numbered when taken; returns the new path."""
    target, number = folder.with_name(f"{folder.name}.{key[:8]}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{key[:8]}-{number}")
    folder.rename(target)
    return target


def _read(path: Path) -> StageRecord | None:
    if not path.is_file():
        return None
    refuse_others(path)
    try:
        return StageRecord(**read_json(path, StateError))
    except (TypeError, StateError) as error:
        raise StateError(
            f"the record of a stage cannot be read ({getattr(error, 'what', error)})",
            where=str(path),
            hint="move its folder away to start anew",
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
