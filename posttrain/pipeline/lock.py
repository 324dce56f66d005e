"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.errors import StateError

LOCK = ".pipeline.lock"


@contextmanager
def locked(output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the pipeline's output folder against a second run. Created if missing.

    The operating system holds the lock for this process and drops it when the process ends, however it ends. The host
    and process id in the file are for people, and for file systems that do not share locks between hosts.

    Args:
        output: the pipeline's output folder.
        say: gets one line if an earlier run left its lock behind.

    Raises:
        StateError: another process holds it, or a process of another host may.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            # a record lock, because a flock would live on in forked worker processes that outlast a killed run
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _taken(path, _holder(descriptor)) from None
        holder = _holder(descriptor)
        if holder is not None and holder["host"] != socket.gethostname():
            raise _taken(path, holder)
        if holder is not None:
            say(f"an earlier run (process {holder['pid']}, {holder['started']}) ended without cleaning up; taking over")
        _fill(
            descriptor,
            json.dumps(
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "started": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            ),
        )
        try:
            yield
        finally:
            _fill(descriptor, "")
    finally:
        os.close(descriptor)


def _taken(path: Path, holder: dict[str, Any] | None) -> StateError:
    who = f"process {holder['pid']} on {holder['host']} since {holder['started']}" if holder else "another process"
    return StateError(
        f"another run of a pipeline uses this output folder: {who}",
        where=str(path),
        hint="wait for it or give this one another `output`; if that run has surely ended, delete the file",
    )


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Who the lock file names; None when it is empty, or cut short by a full disk."""
    try:
        return json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None


def _fill(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)
