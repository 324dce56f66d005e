"""What a command is doing: a line on standard error for each phase that may last. Imports nothing heavy.

The first one comes before torch and transformers are imported, which takes seconds by itself. Standard output belongs
to results and to the lines of the steps.
"""

from __future__ import annotations

import os
import time

from posttrain.terminal import say

_started: float | None = None
_silent = False


def phase(text: str) -> None:
    """Say what begins now and how many seconds after the first phase; the main rank alone does."""
    global _started
    now = time.monotonic()
    _started = now if _started is None else _started
    if _silent or os.environ.get("RANK", "0") != "0":
        return
    say(f"[{now - _started:6.1f} s] {text}", err=True)


def silence(silent: bool = True) -> None:
    """Say nothing from now on (`tracking.console: off`), or speak again."""
    global _silent
    _silent = silent
