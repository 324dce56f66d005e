"""`samples.jsonl`: a few completions of every step with verdict, reward and advantage, for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.bounded_files import parse_json, whole_lines
from posttrain.errors import DataError
from posttrain.safe_files import open_plain, write_text_atomic


class Transcript:
    """Appends JSON lines to `path`; each has the optimizer step it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8", opener=open_plain) as file:
            file.write(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Forget entries from optimizer step `step` (from 0) on, and a line that was cut by a crash.

        A resumed run writes them again.

        Raises:
            DataError: a line before the last is no entry.
        """
        if not self.path.exists():
            return
        kept = [line for line, where in whole_lines(self.path) if _step(line, where) < step]
        write_text_atomic(self.path, "".join(line + "\n" for line in kept))


def _step(line: str, where: str) -> int:
    try:
        return int(parse_json(line, where)["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError("not an entry of a transcript", where=where) from error
