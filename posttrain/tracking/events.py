"""The event file of a run, `metrics.jsonl`: one JSON object per line, each with its `step`.

An entry holds metrics by name, `time` (Unix seconds), and `nonfinite` with the names whose value, NaN or infinite, is
written as null. An alarm is a line of its own with the key `alarm`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from posttrain.bounded_files import parse_json, whole_lines
from posttrain.errors import DataError, StateError
from posttrain.safe_files import open_plain, write_text_atomic

Event = dict[str, Any]

FILE_NAME = "metrics.jsonl"

_TEXTS = ("nonfinite",)
"""What is no metric in an entry."""


class EventFile:
    """Appends events to a file, each flushed at once. Opened at the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            StateError: the file holds events of an earlier run; `rewind` says how many to keep.
        """
        if self._stream is None and self.path.exists() and self.path.stat().st_size:
            raise StateError(
                "there are metrics of an earlier run",
                where=str(self.path),
                hint="resume that run (--resume auto), or choose another `output` folder",
            )
        stream = self._stream or self._open()
        stream.write(json.dumps(event, allow_nan=False) + "\n")
        stream.flush()

    def rewind(self, step: int) -> list[Event]:
        """Drop all events after `step`, and a line that was cut by a crash; then go on appending.

        Returns:
            The events that are kept.
        """
        self.close()
        kept = [event for event in read_events(self.path) if event["step"] <= step] if self.path.exists() else []
        write_text_atomic(self.path, "".join(json.dumps(event) + "\n" for event in kept))
        self._open()
        return kept

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(self.path, "a", encoding="utf-8", opener=open_plain)
        return self._stream


def read_events(path: Path) -> list[Event]:
    """All events of a file, in order. An unfinished last line is left out: a killed run leaves one.

    Raises:
        DataError: there is no such file, or a line is not an event.
    """
    if not path.is_file():
        raise DataError("no metrics", where=str(path), hint="give the output folder of a run")
    events = []
    for line, where in whole_lines(path):
        event = parse_json(line, where)
        if not isinstance(event, dict) or not isinstance(event.get("step"), int):
            raise DataError("not an event: no `step`", where=where)
        if "alarm" not in event and not isinstance(event.get("time"), int | float):
            raise DataError("not an event: no `time`", where=where)
        wrong = [name for name, value in event.items() if name not in _TEXTS and not _is_number(value)]
        if wrong and "alarm" not in event:
            raise DataError(f"not an event: {wrong[0]} is no number", where=where)
        events.append(event)
    return events


def _is_number(value: object) -> bool:
    """Whether it is one that a run writes; null stands for one that is not finite."""
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def to_event(step: int, time: float, metrics: Mapping[str, float]) -> Event:
    """The entry of one step. Floats are kept to 7 significant digits, whole numbers as they are."""
    event: Event = {"step": step, "time": round(time, 3)}
    nonfinite = []
    for name, value in metrics.items():
        if isinstance(value, int):
            event[name] = value
        elif math.isfinite(value := float(value)):
            event[name] = float(f"{value:.7g}")
        else:
            event[name] = None
            nonfinite.append(name)
    return event | {"nonfinite": nonfinite} if nonfinite else event


def metrics_of(event: Event) -> dict[str, float]:
    """The metrics of an entry, null as NaN. Empty for an alarm."""
    if "alarm" in event:
        return {}
    return {
        name: math.nan if value is None else value
        for name, value in event.items()
        if name not in ("step", "time", "nonfinite")
    }


def series(events: list[Event], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    found = [(event["step"], values[metric]) for event in events if metric in (values := metrics_of(event))]
    return [step for step, _ in found], [value for _, value in found]
