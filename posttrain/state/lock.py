"""One process at a time writes a folder.

Three layers, because file systems of clusters differ. The operating system holds a record lock for the process and
drops it when the process ends, however it ends. For file systems that do not share locks between hosts, the file names
its holder, and the holder's heartbeat changes its time stamp; a file of another host whose stamp stands still is stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.errors import StateError
from posttrain.safe_files import open_plain, private_folder
from posttrain.terminal import say

HEARTBEAT = 5.0
"""Seconds between two signs of life."""

PATIENCE = 30.0
"""Seconds without a sign of life after which the lock of another host counts as stale."""


@contextmanager
def locked(
    path: Path,
    say: Callable[[str], None],
    *,
    what: str,
    heartbeat: float = HEARTBEAT,
    patience: float = PATIENCE,
) -> Iterator[None]:
    """Hold `path` against a second process. Its folder is created if missing, for the owner alone.

    Args:
        path: the lock file, inside the folder to hold.
        say: gets a line if an earlier holder left its lock behind.
        what: who holds it, for the message: `a run`.
        heartbeat: seconds.
        patience: seconds; only spent where the file names another host.

    Raises:
        StateError: another process holds it; names its id and host. Or it is no plain file.
    """
    private_folder(path.parent)
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            # a record lock, because a flock would live on in forked worker processes that outlast a killed run
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _taken(path, _holder(descriptor), what) from None
        _take_over(path, _holder(descriptor), say, what, patience)
        _fill(descriptor, json.dumps(_myself()))
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(descriptor, heartbeat, ended), name="lock heartbeat", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            _fill(descriptor, "")
    finally:
        os.close(descriptor)


def say_on_stderr(line: str) -> None:
    """For `locked`, where there is no other place for a line yet."""
    say(line, err=True)


def _take_over(
    path: Path, holder: dict[str, Any] | None, say: Callable[[str], None], what: str, patience: float
) -> None:
    if holder is None:
        return
    if holder["host"] != socket.gethostname():
        say(
            f"{path} names process {holder['pid']} on {holder['host']}; "
            f"waiting {patience:g} s for a sign of life from it"
        )
        if _alive(path, patience):
            raise _taken(path, holder, what)
    say(
        f"{what} (process {holder['pid']} on {holder['host']}, since {holder['started']}) ended without cleaning up; "
        "taking over"
    )


def _alive(path: Path, patience: float) -> bool:
    """Whether the time stamp moves. Stamps are compared with each other only: clocks of hosts differ."""
    first, deadline = path.stat().st_mtime_ns, time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(0.5, patience / 10))
        os.close(os.open(path.parent, os.O_RDONLY))  # opening it makes a network file system look again
        if path.stat().st_mtime_ns != first:
            return True
    return False


def _beat(descriptor: int, seconds: float, ended: threading.Event) -> None:
    while not ended.wait(seconds):
        with suppress(OSError):  # a file system that is away for a moment must not end the signs of life
            os.utime(descriptor)


def _taken(path: Path, holder: dict[str, Any] | None, what: str) -> StateError:
    who = f"process {holder['pid']} on {holder['host']} since {holder['started']}" if holder else "another process"
    return StateError(
        f"{what} uses this folder already: {who}",
        where=str(path),
        hint="wait for it, or give this one another `output`",
    )


def _myself() -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Who the lock file names; None when it is empty, or cut short by a full disk."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) and {"pid", "host", "started"} <= set(holder) else None


def _fill(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)
