"""The folder through which the weights of one sync go to a vLLM server, and what a killed trainer left of one.

The process that makes a folder holds a lock on it, which the system drops when the process ends, however it ends. So a
folder of this user and machine that nobody holds is of a trainer that is dead, and may be as large as its model.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.rollouts.vllm_guard import PREFIX

JUST_MADE = 60.0
"""Seconds within which a folder that is not locked may be one that is being made."""


@contextmanager
def transfer_folder(within: str) -> Iterator[Path]:
    """A private folder in `within`, held until the block ends, and then removed with all in it."""
    folder = Path(tempfile.mkdtemp(prefix=_ours(), dir=within))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _take(descriptor)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def remove_left_behind(within: str) -> list[Path]:
    """Remove the folders of syncs whose trainers on this machine are dead.

    Folders of other users, machines and running trainers stay, and all of them where the file system has no locks.

    Returns:
        What was removed.
    """
    return [folder for folder in sorted(Path(within).glob(f"{_ours()}*")) if _removed(folder)]


def _removed(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # a link, another user's, or gone by now
    try:
        found = os.fstat(descriptor)
        own = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077
        if not own or time.time() - found.st_mtime < JUST_MADE or not _take(descriptor):
            return False
        shutil.rmtree(folder, ignore_errors=True)  # which follows no links
        return not folder.exists()
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    """Whether the folder is held by this process from now on; False too where the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _ours() -> str:
    """How the names of this machine's folders begin: others may see the same file system, and not its locks."""
    return f"{PREFIX}{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}_"
