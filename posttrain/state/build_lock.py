"""Locks that a killed build of a PyTorch extension leaves behind, for which the next start would wait for ever.

DeepSpeed compiles what it needs at its first start, by `torch.utils.cpp_extension`. That puts an empty file `lock` into
the extension's folder while one process compiles, and all others wait until it is gone. It names nobody, but whoever
holds it keeps it open from the moment it exists: a lock that no process has open is nobody's.

Other caches of the stack (Hub, datasets, Inductor, vLLM) lock with `flock`, which the system drops with its holder.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 2.0
"""Seconds for which nobody may have a lock open before it counts as left behind."""

LONG = 3600.0
"""Seconds after which a lock on a file system that other hosts share counts as left behind: no build takes as long."""

SHARED = ("nfs", "lustre", "gpfs", "cifs", "smb", "ceph", "beegfs", "fuse", "afs", "9p")
"""Beginnings of the names of file systems that several hosts may write to."""


def extensions_folder() -> Path:
    """Where PyTorch builds extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def free_build_locks(root: Path, say: Callable[[str], None], *, patience: float = PATIENCE) -> list[Path]:
    """Remove the locks of builds that were killed, and say so. One process of each host calls it, before any build.

    Args:
        root: as `extensions_folder` gives it.
        say: gets a line for every lock that was removed, or that stays because another host may hold it.
        patience: seconds for which a lock must be nobody's.

    Returns:
        What was removed.
    """
    found = {path: _stamp(path) for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)}
    idle = [path for path in found if not _is_open(path)]
    if not idle:
        return []
    time.sleep(patience)
    removed = []
    for path in idle:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # of two runs that start now, one looks and removes first
            if _stamp(path) != found[path] or _is_open(path):
                continue
            age = time.time() - path.stat().st_mtime
            if age < LONG and _is_shared(path):
                say(
                    f"{path} is held by no process on {socket.gethostname()}, and is {age:.0f} s old; if no other host "
                    "is compiling, delete it: this run waits for it"
                )
                continue
            path.unlink()
            removed.append(path)
            say(
                f"{path}: removed, left by a build that was killed; {path.parent.name} is compiled again, which takes "
                "minutes"
            )
        finally:
            os.close(folder)
    return removed


def _stamp(path: Path) -> tuple[int, int] | None:
    """Which file it is; None once it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _is_open(path: Path) -> bool:
    """Whether a process of this host has the file open, as far as this user may see."""
    there = _stamp(path)
    return there is not None and any(_stamp(descriptor) == there for descriptor in _descriptors(path))


def _descriptors(path: Path) -> Iterator[Path]:
    """Open descriptors on this host that lead to this path."""
    target = str(path.resolve())
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            for entry in os.scandir(folder):
                if os.readlink(entry.path) == target:
                    yield Path(entry.path)
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # somebody else's process, or one that has just ended


def _is_shared(path: Path) -> bool:
    """Whether other hosts may write to the file system."""
    kind = subprocess.run(["stat", "--file-system", "--format=%T", path], capture_output=True, text=True, check=False)
    return kind.stdout.strip().lower().startswith(SHARED)
