"""Starts an interpreter under bubblewrap (0.8 or newer).

What the code can see and do is said here; how long and how much, in `sandbox`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

NOBODY = 65534
"""The user that code runs as where this process is root's."""

_NAMESPACES = ("user", "pid", "net", "ipc", "uts", "cgroup-try")
_MB = 1 << 20


class SandboxError(Exception):
    """A sandbox that could not be set up; the message says why."""


def start(
    arguments: Sequence[str], file_mb: int, descriptors: Sequence[int], pipes: dict[str, Any]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command in namespaces of its own.

    Under root two users exist inside, root and 65534, so that the command can give root up: the kernel does not bound
    the number of processes of root, in whatever namespace. It is left the capabilities for that, and loses them by it.

    Args:
        arguments: the command.
        file_mb: MiB of its private /tmp.
        descriptors: open files that it gets, beside the standard ones.
        pipes: `stdin`, `stdout` and `stderr` as for `subprocess.Popen`.

    Returns:
        bubblewrap's own process, and the process id, as seen from here, of the first one inside.

    Raises:
        SandboxError: bubblewrap fails, for example since it may not make namespaces.
    """
    root = os.geteuid() == 0
    info_read, info_write = os.pipe()
    block_read, block_write = os.pipe()
    options = ["--info-fd", str(info_write)]
    if root:
        options += ["--userns-block-fd", str(block_read)]
        options += [word for name in ("SETUID", "SETGID", "SYS_RESOURCE") for word in ("--cap-add", f"CAP_{name}")]
    else:
        options += ["--disable-userns"]  # under root the code in the sandbox switches them off
    try:
        process = subprocess.Popen(
            [*command(file_mb), *options, "--", *arguments],
            pass_fds=[info_write, block_read, *descriptors],
            env={},
            **pipes,
        )
    finally:
        os.close(info_write)
        os.close(block_read)
    try:
        first = _first_process(info_read)
        if root:
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{first}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            os.write(block_write, b"1")
        return process, first
    except OSError as error:
        process.kill()
        said = process.stderr.read(4096).decode(errors="replace").strip()
        process.wait()
        raise SandboxError(said or f"bubblewrap: {error}") from error
    finally:
        os.close(info_read)
        os.close(block_write)


def _first_process(info: int) -> int:
    text = b""
    while b"}" not in text:
        part = os.read(info, 4096)
        if not part:
            raise ChildProcessError("it ended before it started anything")
        text += part
    return json.loads(text)["child-pid"]


@cache
def command(file_mb: int) -> tuple[str, ...]:
    """bubblewrap with its namespaces, mounts and environment, up to the command."""
    words = [str(shutil.which("bwrap")), "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    words += [f"--unshare-{name}" for name in _NAMESPACES]
    words += ["--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            words += ["--ro-bind", folder, folder]
    words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc", "--dev", "/dev"]
    words += ["--perms", "1777", "--size", str(file_mb * _MB), "--tmpfs", "/tmp"]  # nosec B108 # the sandbox's
    for prefix in _prefixes():
        # The folders above it would get the modes they have here, which another user may not be able to enter.
        for parent in reversed(prefix.parents[:-1]):
            if str(parent) not in ("/tmp", "/usr"):  # nosec B108 # likewise
                words += ["--perms", "0755", "--dir", str(parent)]
        words += ["--ro-bind", str(prefix), str(prefix)]
    words += ["--chdir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]  # nosec B108 # likewise
    for name, value in environment("/tmp").items():  # nosec B108 # likewise
        words += ["--setenv", name, value]
    return tuple(words)


def environment(home: str) -> dict[str, str]:
    """All variables that tested code gets."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    return {"PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8", "TMPDIR": home} | threads


def packages() -> list[str]:
    """Folders of installed packages, for code that needs numpy."""
    return [path for path in map(os.path.abspath, sys.path) if path.endswith(("site-packages", "dist-packages"))]


def _prefixes() -> list[Path]:
    """Folders of this Python installation that `/usr` does not hold."""
    found = {Path(sys.base_prefix), Path(sys.prefix), *map(Path, packages())}
    outside = sorted(path for path in found if path.parts[:2] != ("/", "usr"))
    return [path for path in outside if not any(other in path.parents for other in outside)]
