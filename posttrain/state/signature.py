"""Who wrote a checkpoint. DeepSpeed and FSDP load theirs by unpickling, which runs whatever code a file names; so one
is only loaded if this user's own runs wrote it, or if the user says that it may be.

The checksum of a checkpoint finds damage, and anybody can make one. The signature is keyed with a secret of this user
(HMAC-SHA256), which lies in the user's home and in no run folder.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from posttrain.safe_files import open_plain

_BYTES = 32

_LOADED_SAFELY = re.compile(
    r"[^/]+\.(?:safetensors|json|jsonl|txt|md|jinja|model|tiktoken|yaml)"
    r"|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(?:_\d+)?\.pth"
    r"|(?:tokenizer|model|adapter|critic|reference)/[^/]+\.(?:safetensors|json|txt|md|jinja|model)"
)
"""Files that are read as data: by safetensors, as text, or by the Trainer with torch's unpickler of tensors alone."""


def secret_file() -> Path:
    """Where this user's secret lies."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "posttrain" / "checkpoint.key"


def sign(seal: str) -> str | None:
    """The signature of a checkpoint's checksum; None where this user has no place for a secret."""
    secret = _secret() or _make_secret()
    return None if secret is None else _signature(secret, seal)


def is_signed(seal: str, signature: object) -> bool:
    """Whether this user's secret made the signature."""
    secret = _secret()
    if secret is None or not isinstance(signature, str):
        return False
    return hmac.compare_digest(_signature(secret, seal).encode(), signature.encode())


def unpickled(checkpoint: Path) -> list[str]:
    """Files of a checkpoint that may be loaded by an unpickler that runs code; links too, wherever they lead."""
    found = []
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_symlink() or (not path.is_dir() and not _LOADED_SAFELY.fullmatch(name)):
            found.append(name)
    return sorted(found)


def unlisted(names: Iterable[str], listed: Iterable[str]) -> list[str]:
    """Names of files that a manifest does not have."""
    return sorted(set(names) - set(listed))


def _signature(secret: bytes, seal: str) -> str:
    return hmac.new(secret, b"posttrain checkpoint\0" + seal.encode(), hashlib.sha256).hexdigest()


def _secret() -> bytes | None:
    try:
        descriptor = open_plain(secret_file(), os.O_RDONLY)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            return None  # others know it, or have put it there
        secret = file.read(_BYTES + 1)
    return secret if len(secret) == _BYTES else None


def _make_secret() -> bytes | None:
    path = secret_file()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(open_plain(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            os.fsync(file.fileno())
        try:
            os.link(beside, path)  # the first of several runs wins; a secret that is there stays
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    except OSError:
        return None
    return _secret()
