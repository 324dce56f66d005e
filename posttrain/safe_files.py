"""Files that are either whole or absent: written beside, synced, renamed.

Others may be able to write to a folder that posttrain writes to. What they put at a name that posttrain uses, say a
link to a file of the user's, is replaced or refused, and never written through.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import DataError, StateError


def open_plain(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor of the file at this very place; also an `opener` for Python's own `open`.

    Raises:
        StateError: a link or something that is no plain file, such as a pipe, stands there.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _planted(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _planted(path)
    return descriptor


def _planted(path: str | Path) -> StateError:
    return StateError(
        "a link or pipe stands where posttrain writes a file of its own", where=str(path), hint="look at it; remove it"
    )


def refuse_linked_folders(folder: Path) -> None:
    """Refuse to work in a folder if a link to another folder, or to nothing, stands in it or among its checkpoints.

    What a run writes by way of such a link, plots or a checkpoint, would replace files elsewhere.

    Raises:
        StateError: names the first one.
    """
    for place in (folder, folder / "checkpoints"):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.is_symlink() and (path.is_dir() or not path.exists()):
                raise StateError(
                    "a link stands where a run may write a folder of its own, and files elsewhere would be overwritten",
                    where=str(path),
                    hint="look at it; remove it. To keep all of a run elsewhere, set `output` to that place",
                )


def leads_out(path: Path, folder: Path) -> Path | None:
    """Where a path in somebody's folder really leads, if that is outside of the folder; None if it stays within.

    Of a copy in the Hub's cache the files are links to where all its versions are kept, which counts as within.
    """
    whole, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    kept = [parent.parent / "blobs" for parent in whole.parents if parent.name == "snapshots"]
    return None if any(target.is_relative_to(place) for place in (whole, *kept)) else target


def leading_out(folder: Path, *inside: str) -> Iterator[tuple[Path, Path]]:
    """What stands in a folder, or in these folders inside it, and leads out; and where each really leads."""
    for place in (folder, *(folder / name for name in inside)):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            target = leads_out(path, folder)
            if target is not None:
                yield path, target


def refuse_links_out(folder: Path) -> None:
    """Refuse to read a folder of a run, pipeline or study in which a link leads out: what it names would be shown.

    Args:
        folder: itself, and in it the folders of evaluations, are looked at; need not be there.

    Raises:
        DataError: names the first one.
    """
    for path, target in leading_out(folder, "evaluation", "held_out"):
        raise DataError(
            f"a link to {target}, which is not within the folder that is read",
            where=str(path),
            hint="look at it; if it is yours, put what it leads to in its place",
        )


def refuse_links_below(folder: Path) -> None:
    """Refuse to write to a tree of folders in which a link, at any depth, leads out of it.

    Raises:
        StateError: names one.
    """
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in sorted((*folders, *files))):
            if path.is_symlink() and leads_out(path, folder) is not None:
                raise StateError(
                    "a link leads out of the folder that is written to", where=str(path), hint="look at it; remove it"
                )


def refuse_others(path: Path) -> None:
    """Refuse to take a record of what has been done from somebody else: it would be believed, and not done again.

    Raises:
        StateError: another user owns the file, or everybody may write to it or to its folder.
    """
    # Below a folder that they cannot enter, as a run's own is, others may have what rights they will.
    entered = all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(os.path.realpath(path)).parents)
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid not in (0, os.geteuid()) or (entered and status.st_mode & stat.S_IWOTH):
            raise StateError(
                "somebody else may have written what this says has been done",
                where=str(path),
                hint="if you believe it, copy the whole folder (cp -r) and go on in the copy; or choose another output",
            )


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter, unless it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def temporary_log(kind: str) -> Path:
    """An empty file for what processes of this kind write, which only its owner can read."""
    descriptor, name = tempfile.mkstemp(prefix=f"posttrain-{kind}-", suffix=".log")
    os.close(descriptor)
    return Path(name)


def clear(path: Path) -> None:
    """Delete what stands at a place, if anything does: a file, a folder with all in it, a link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    clear(beside)
    with open(beside, "x", encoding="utf-8", opener=open_plain) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` for a JSON value."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_atomic(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it takes that name, replacing an older one, only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, which nobody else can enter: whoever writes it may follow links.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as private:
        beside = Path(private) / path.name
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    sync_folder(path.parent)


@contextmanager
def folder_atomic(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`; it takes that name, replacing an older one, only if the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, which nobody else can enter and which goes away whatever happens.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as private:
        beside = Path(private) / folder.name
        beside.mkdir()
        yield beside
        clear(folder)
        beside.rename(folder)
    sync_folder(folder.parent)
