"""A process for environments under bubblewrap: files can be read, nothing but a folder in memory can be written, and
there is no network. For tools with side effects; what they compute, they compute as in any other process.

What is secret is not hidden here: a tool reads what this user can read, and may tell the policy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from posttrain.errors import WorldError

FOLDER = "/episodes"
"""Where environments may write, a folder for each episode."""

FILES_MB = 64
"""MiB of all files of a process, which are held in memory."""

HINT = "install the package `bubblewrap` (0.8 or newer) and allow user namespaces, or leave `sandbox` out"


def check() -> None:
    """Start a process that does nothing.

    Raises:
        WorldError: bubblewrap is missing, or may not make namespaces here.
    """
    if shutil.which("bwrap") is None:
        raise WorldError("`bwrap` is not installed", where="environment.sandbox", hint=HINT)
    tried = subprocess.run([*_words(), "true"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if tried.returncode:
        said = tried.stderr.decode(errors="replace").strip()
        raise WorldError(f"no environment can be confined here: {said}", where="environment.sandbox", hint=HINT)


def command(log: Path) -> list[str]:
    """bubblewrap, up to the command that it runs.

    Args:
        log: the one file of this machine that can be written.
    """
    log.touch(mode=0o600)
    return [*_words(["--bind", str(log.resolve()), str(log.resolve())]), "--"]


def _words(further: list[str] | None = None) -> list[str]:
    words = ["bwrap", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts")]
    for entry in sorted(os.scandir("/"), key=lambda entry: entry.name):
        if entry.is_symlink():
            words += ["--symlink", os.readlink(entry.path), entry.path]
        elif entry.name not in ("proc", "dev", FOLDER[1:]):
            words += ["--ro-bind", entry.path, entry.path]
    words += ["--proc", "/proc", "--dev", "/dev", *(further or [])]
    words += ["--size", str(FILES_MB << 20), "--tmpfs", FOLDER, "--remount-ro", "/dev", "--remount-ro", "/"]
    return [*words, "--chdir", os.getcwd(), "--setenv", "TMPDIR", FOLDER, "--setenv", "HOME", FOLDER]
