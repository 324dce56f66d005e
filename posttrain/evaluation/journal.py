"""The journal of an evaluation: what is done, on disk, so that an interrupted evaluation goes on where it was.

One JSON object per line, one line per chunk of problems. A chunk belongs to a key, the hash of everything that its
result depends on: weights, chat template, problems, verifiers, sampling, versions. Chunks of other keys are left alone
and not used. Draws depend on the number of the problem and not on the chunk, so a result does not depend on where the
evaluation was interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from posttrain.errors import StateError
from posttrain.safe_files import open_plain
from posttrain.verifiers.verdict import Status


@dataclass(frozen=True, slots=True)
class Chunk:
    """What happened on consecutive problems of one benchmark in one pass (greedy or sampled).

    Attributes:
        key: of the pass, see `Journal.key`.
        start: number of the first problem, from 0.
        statuses: (problems, samples) verdicts.
        answers: (problems, samples) what each completion votes for; None where it abstains.
        truncated: completions cut at the token limit.
        prompt_tokens: tokens of the prompts, each counted once.
        new_tokens: tokens of the completions.
        seconds: wall clock of sampling and verifying.
        unrevised: answers left as they were, see `report.Pass`.
        drawn_tokens: by a search, see `report.Pass`.
        texts: (problems, samples) the first of the completions of each problem, to be read.
    """

    key: str
    start: int
    statuses: list[list[Status]]
    answers: list[list[str | None]]
    truncated: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    unrevised: int = 0
    drawn_tokens: int = 0
    texts: list[list[str]] = field(default_factory=list)


_ADAPTER = TypeAdapter(Chunk)


class Journal:
    """An open journal. A line that an earlier process did not finish is removed.

    Args:
        path: of the file, which is made if it is not there.
        identity: of the model and all else that is the same for every pass; JSON values.

    Raises:
        StateError: another process writes to it, or it is no journal.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", opener=open_plain)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.close()
            raise StateError("another evaluation writes to this file", where=str(path)) from None
        self._file.seek(0)
        whole, newline, _unfinished = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole) + len(newline))
        self._chunks = [self._parse(line, number) for number, line in enumerate(whole.split(b"\n"), 1) if line]

    def key(self, parts: Mapping[str, Any]) -> str:
        """The key of a pass: a hash of the identity and of `parts`, JSON values."""
        text = json.dumps({"identity": self.identity, "pass": dict(parts)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def done(self, key: str) -> list[Chunk]:
        """The chunks of a pass in order, none twice. There may be gaps, where several workers made them."""
        found: list[Chunk] = []
        for chunk in sorted((chunk for chunk in self._chunks if chunk.key == key), key=lambda chunk: chunk.start):
            if not found or chunk.start >= found[-1].start + len(found[-1].statuses):
                found.append(chunk)
        return found

    @property
    def keys(self) -> set[str]:
        """Keys of which there are chunks."""
        return {chunk.key for chunk in self._chunks}

    def append(self, chunk: Chunk) -> None:
        """Add a chunk; it is on the disk when this returns."""
        self._file.write((json.dumps(asdict(chunk)) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._chunks.append(chunk)

    def close(self) -> None:
        """Let others write; the file stays."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file: its evaluation is complete and saved elsewhere."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _parse(self, line: bytes, number: int) -> Chunk:
        try:
            return _ADAPTER.validate_json(line)
        except ValidationError as error:
            raise StateError(
                "not a chunk of an interrupted evaluation",
                where=f"{self.path}:{number}",
                hint="remove the file to start anew, or choose another output",
            ) from error
