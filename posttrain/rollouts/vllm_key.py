"""The key of a vLLM server on this machine, where nobody gave one: made once per port, in a file for this user alone.

`python -m posttrain.rollouts.vllm_key PORT` prints it, for launch/vllm_server.sh; the trainer reads the same file.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit

from posttrain.config.trust import is_this_machine
from posttrain.errors import EngineError, StateError
from posttrain.safe_files import open_plain
from posttrain.terminal import say


def key_file(port: int) -> Path:
    """Where the key of a port of this machine lies. Homes are often shared by machines, so the host is in its name."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "posttrain" / f"vllm-{socket.gethostname()}-{port}.key"


def read_key(url: str) -> str | None:
    """The key for an address of this machine; None where there is none, or the address is another's.

    Raises:
        EngineError: the file is not this user's alone.
    """
    parts = urlsplit(url)
    return _read(key_file(parts.port or 80)) if is_this_machine(url) else None


def make_key(port: int) -> str:
    """The key of a port, made if it is missing.

    Raises:
        EngineError: the file is not this user's alone.
    """
    path = key_file(port)
    key = _read(path)
    if key is None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = secrets.token_urlsafe(32)
        with os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key)
    return key


def _read(path: Path) -> str | None:
    try:
        descriptor = open_plain(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except (OSError, StateError) as error:
        raise EngineError(f"the server's key cannot be read: {error}", where=str(path)) from error
    with os.fdopen(descriptor, encoding="ascii") as file:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise EngineError(
                "others can read the server's key, or have put it there", where=str(path), hint="remove the file"
            )
        return file.read().strip() or None


if __name__ == "__main__":
    say(make_key(int(sys.argv[1])))
