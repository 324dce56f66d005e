"""`samples.jsonl`: a few completions of every step with verdict, reward and advantage, for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Transcript:
    """Appends JSON lines to `path`; each has the optimizer step it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Forget entries from optimizer step `step` (from 0) on: a resumed run writes them again."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] < step]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
