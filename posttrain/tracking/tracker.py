"""The tracker: takes a step's metrics, checks their names, writes them, shows them, and raises alarms."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from posttrain.tracking.alarms import alarms
from posttrain.tracking.console import Console, ConsoleKind, NoConsole, PlainConsole
from posttrain.tracking.events import FILE_NAME, EventFile, metrics_of, to_event
from posttrain.tracking.metrics import METRICS, declared, require

# A few times the largest patience: what an alarm has to look back on.
HISTORY = 8 * max(metric.patience for metric in METRICS.values())


class Tracker:
    """Metrics of one run: `<run_dir>/metrics.jsonl`, the console, alarms, and plots at the end.

    Args:
        run_dir: the run's folder; made if missing.
        console: `live` (a panel that redraws itself), `plain` (lines), `off`, or `auto` (live on a terminal).
        total_steps: optimizer steps of the whole run.
        headline: metric that is shown first and drawn as a small curve.
        main_process: False makes every call do nothing.
        stream: where the console writes; default: standard output.

    Raises:
        MetricError: the headline is not registered.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        console: ConsoleKind,
        total_steps: int,
        headline: str = "reward",
        main_process: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        require(headline)
        self.run_dir = Path(run_dir)
        self.main_process = main_process
        self._events = EventFile(self.run_dir / FILE_NAME)
        self._history: deque[Mapping[str, float]] = deque(maxlen=HISTORY)
        self._console: Console = make_console(
            console if main_process else "off", total_steps=total_steps, headline=headline, stream=stream
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an optimizer step. A step may have several entries (training, then evaluation).

        Raises:
            StateError: the folder holds metrics of an earlier run, and `rewind` was not called.
        """
        if not self.main_process:
            return
        metrics = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        for name in metrics:
            declared(name)
        now = time.time()
        self._events.append(to_event(step, now, metrics))
        self._console.update(step, metrics)
        for alarm in alarms(step, metrics, self._history):
            event = to_event(step, now, {"value": alarm.value})
            self._events.append(event | {"alarm": alarm.name, "metric": alarm.metric, "text": alarm.text})
            self._console.alarm(alarm)
        self._history.append(metrics)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`; for resuming from the checkpoint of that step."""
        if not self.main_process:
            return
        self._history.clear()
        self._history.extend(values for event in self._events.rewind(step) if (values := metrics_of(event)))

    def message(self, text: str) -> None:
        """Show a line of text."""
        self._console.message(text)

    def close(self, plots: bool) -> None:
        """End the display, close the file and, if asked and there is anything, draw `plots/*.png`."""
        if not self.main_process:
            return
        self._events.close()
        try:
            if plots and self._history:
                from posttrain.tracking.plots import plot_run

                for path in plot_run(self.run_dir):
                    self.message(f"wrote {path}")
        finally:
            self._console.close()


def make_console(kind: ConsoleKind, *, total_steps: int, headline: str, stream: TextIO | None = None) -> Console:
    """The console of a kind; `auto` is live on a terminal that can move its cursor, else plain."""
    stream = sys.stdout if stream is None else stream
    if kind == "auto":
        kind = "live" if stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown") else "plain"
    if kind == "off":
        return NoConsole()
    if kind == "plain":
        return PlainConsole(total_steps, headline, stream)
    from posttrain.tracking.live import LiveConsole

    return LiveConsole(total_steps, headline, stream)
