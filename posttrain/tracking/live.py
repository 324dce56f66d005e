"""The live console: a panel at the foot of the terminal that redraws itself. Messages scroll by above it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from posttrain.terminal import console
from posttrain.tracking.alarms import Alarm
from posttrain.tracking.console import (
    COLUMNS,
    Column,
    Progress,
    cells,
    duration,
    encodable,
    evaluation_lines,
    headline_first,
    sparkline,
)


class LiveConsole:
    """Progress, the latest metrics, a small curve of the headline metric, the latest evaluation, message and alarm.

    The panel appears with the first metrics; until then messages are plain lines, and an error in the preparation of a
    run leaves the terminal as it was.

    Args:
        total_steps: optimizer steps of the whole run.
        headline: the metric of the curve.
        stream: a terminal.
        columns: which metrics are shown, and how.
        clock: seconds of a clock that does not go back.
        rich_console: instead of one on `stream`.
    """

    def __init__(
        self,
        total_steps: int,
        headline: str,
        stream: TextIO,
        columns: Sequence[Column] = COLUMNS,
        clock: Callable[[], float] = time.monotonic,
        rich_console: RichConsole | None = None,
    ) -> None:
        self._progress = Progress(total_steps, clock)
        self._columns = headline_first(columns, headline)
        self._headline = headline
        self._console = rich_console or console(file=stream)
        self._ascii = not self._console.encoding.lower().startswith("utf")
        self._metrics: Mapping[str, float] = {}
        self._curve: list[float] = []
        self._evaluation: list[str] = []
        self._message = ""
        self._alarm: Alarm | None = None
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=2)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if cells(self._columns, metrics):
            self._progress.update(step)
            self._metrics = metrics
            if self._headline in metrics:
                self._curve.append(metrics[self._headline])
        if lines := evaluation_lines(metrics):
            self._evaluation = [f"step {step}  {line}" for line in lines]
            for line in self._evaluation:
                self._print(line)
        self._live.start()
        self._live.refresh()

    def message(self, text: str) -> None:
        self._message = text
        self._print(text)

    def alarm(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._print(f"ALARM at step {alarm.step}: {alarm.text}", style="yellow")

    def close(self) -> None:
        """Leave the last state of the panel on the screen."""
        self._live.stop()

    def render(self) -> RenderableType:
        """The panel as it is now."""
        parts: list[RenderableType] = [self._head()]
        if values := cells(self._columns, self._metrics):
            parts.append(Columns([self._cell(*value) for value in values], padding=(0, 2)))
        if len(self._curve) > 1:
            parts.append(self._line(self._headline_curve(), style="cyan"))
        parts += [self._line(line, style="green") for line in self._evaluation]
        if self._message:
            parts.append(self._line(self._message, style="dim"))
        if self._alarm is not None:
            parts.append(self._line(f"ALARM at step {self._alarm.step}: {self._alarm.name}", style="bold yellow"))
        return Group(*parts)

    def _head(self) -> RenderableType:
        step, total, left = self._progress.step, self._progress.total_steps, self._progress.left
        share = step / total if total else 1.0
        times = f"elapsed {duration(self._progress.elapsed)}" + ("" if left is None else f"  left {duration(left)}")
        counts, bar = f"step {step}/{total}", ProgressBar(total=max(1, total), completed=step)
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
        if self._console.width >= 60:
            table.add_row(Text(counts, style="bold"), bar, f"{share:.0%}", times)
            return table
        narrow = Table.grid(expand=True)
        narrow.add_row(bar)
        return Group(self._line(f"{counts}  {share:.0%}", style="bold"), narrow, self._line(times))

    @staticmethod
    def _cell(label: str, value: str) -> Text:
        return Text.assemble((f"{label} ", "dim"), (value.strip(), "bold"))

    def _headline_curve(self) -> str:
        ends = f" {self._curve[0]:.3g} to {self._curve[-1]:.3g}"
        width = min(60, self._console.width - len(self._headline) - len(ends) - 1)
        return f"{self._headline} {sparkline(self._curve, width, ascii_only=self._ascii)}{ends}"

    def _line(self, text: str, style: str = "") -> Text:
        return Text(encodable(text, self._console.encoding), style=style, no_wrap=True, overflow="crop")

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(encodable(text, self._console.encoding), style=style))
