"""What a run shows while it trains: a panel that redraws itself on a terminal, else lines. Knows no method.

Which metrics are shown is a table, `COLUMNS`; those that a run does not log are left out.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TextIO

from posttrain.terminal import visible
from posttrain.tracking.alarms import Alarm

ConsoleKind = Literal["auto", "live", "plain", "off"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of steps.

    Attributes:
        metric: registered name.
        label: short name on the screen.
        format: format specification of the value; its width aligns plain lines.
        unless: not shown in runs that log this metric.
    """

    metric: str
    label: str
    format: str
    unless: str = ""


COLUMNS: tuple[Column, ...] = (
    Column("reward", "reward", "6.3f"),
    Column("accuracy", "acc", "5.3f"),
    # By construction near 0 on-policy, where it misleads.
    Column("loss", "loss", "7.4f", unless="reward"),
    Column("token_accuracy", "token acc", "5.3f"),
    Column("pairs/accuracy", "pair acc", "5.3f"),
    Column("pairs/margin", "margin", "7.4f"),
    Column("pairs/logps_chosen", "chosen", "7.2f"),
    Column("kl", "kl", "6.4f"),
    Column("entropy", "entropy", "5.3f"),
    Column("completion_length", "length", "5.0f"),
    Column("truncated_share", "truncated", "5.1%"),
    Column("unknown_share", "unknown", "5.1%"),
    Column("informative_groups", "informative", "4.0%"),
    Column("grad_norm", "grad", "7.3g"),
    Column("tokens_per_second", "tok/s", "6.0f"),
)


class Console(Protocol):
    """Shows a run."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def alarm(self, alarm: Alarm) -> None: ...

    def close(self) -> None: ...


class NoConsole:
    """Shows nothing."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def alarm(self, alarm: Alarm) -> None:
        pass

    def close(self) -> None:
        pass


class Progress:
    """Where a run is and how long it will take, from the speed of the latest steps."""

    WINDOW = 30

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self.total_steps, self._clock = total_steps, clock
        self._started = clock()
        self._marks: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)
        self.step = 0

    def update(self, step: int) -> None:
        self.step = step
        if not self._marks or step > self._marks[-1][0]:
            self._marks.append((step, self._clock()))

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return self._clock() - self._started

    @property
    def left(self) -> float | None:
        """Seconds; None before the second step."""
        if len(self._marks) < 2:
            return None
        (first, then), (last, now) = self._marks[0], self._marks[-1]
        due = now + (now - then) / (last - first) * (self.total_steps - last)
        return max(0.0, due - self._clock())


class PlainConsole:
    """One aligned line now and then: the first and the last step, and between them at most every 2% of the run or
    every 15 seconds, whichever comes first. Evaluations, messages and alarms always.
    """

    SHARE, SECONDS = 0.02, 15.0

    def __init__(
        self,
        total_steps: int,
        headline: str,
        stream: TextIO,
        columns: Sequence[Column] = COLUMNS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = Progress(total_steps, clock)
        self._columns = headline_first(columns, headline)
        self._stream: TextIO | None = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._clock = clock
        self._shown: tuple[int, float] | None = None
        self._waiting: Mapping[str, float] = {}

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if cells(self._columns, metrics):
            self._progress.update(step)
            self._waiting = metrics
            if self._due(step):
                self._show()
        for line in evaluation_lines(metrics):
            self._print(f"step {step}  {line}")

    def message(self, text: str) -> None:
        self._print(text)

    def alarm(self, alarm: Alarm) -> None:
        self._print(f"ALARM at step {alarm.step}: {alarm.text}")

    def close(self) -> None:
        """Show the last step if it was not."""
        if self._waiting:
            self._show()

    def _due(self, step: int) -> bool:
        total = self._progress.total_steps
        if self._shown is None or step >= total:
            return True
        before, then = self._shown
        return step - before >= self.SHARE * total or self._clock() - then >= self.SECONDS

    def _show(self) -> None:
        step, total = self._progress.step, self._progress.total_steps
        values = "  ".join(f"{label} {value}" for label, value in cells(self._columns, self._waiting))
        left = self._progress.left
        times = f"elapsed {duration(self._progress.elapsed)}" + ("" if left is None else f"  left {duration(left)}")
        self._print(f"step {step:>{len(str(total))}}/{total}  {values}  {times}")
        self._shown, self._waiting = (step, self._clock()), {}

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(encodable(text, self._encoding) + "\n")
            self._stream.flush()
        except OSError:
            # Whoever read the log is gone (a closed pipe or terminal). The run goes on; metrics.jsonl has it all.
            self._stream = None


# ------------------------------------------------------------------------------------------------------------- text


def headline_first(columns: Iterable[Column], headline: str) -> tuple[Column, ...]:
    """The columns with the headline's in front; one is made for it if there is none."""
    columns = tuple(columns)
    first = [column for column in columns if column.metric == headline] or [Column(headline, headline, "7.4g")]
    return (*first, *(column for column in columns if column.metric != headline))


def cells(columns: Iterable[Column], metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and formatted value of the columns that `metrics` has."""
    return [
        (column.label, format(metrics[column.metric], column.format))
        for column in columns
        if column.metric in metrics and column.unless not in metrics
    ]


def evaluation_lines(metrics: Mapping[str, float]) -> list[str]:
    """One line per benchmark: `gsm8k  greedy 0.412 [0.380, 0.444]  pass@8 0.702`."""
    benchmarks: dict[str, list[str]] = {}
    for name, value in metrics.items():
        if not name.startswith("eval/") or name.endswith(("_low", "_high")):
            continue
        benchmark, measure = name.removeprefix("eval/").rsplit("/", 1)
        text = f"{measure.replace('_', ' ')} {value:.1f}" if "length" in measure else f"{measure} {value:.3f}"
        if f"{name}_low" in metrics and f"{name}_high" in metrics:
            text += f" [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
        benchmarks.setdefault(benchmark, []).append(text)
    return [f"eval {benchmark}  {'  '.join(texts)}" for benchmark, texts in benchmarks.items()]


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`, `2d 04:10`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_of_day = divmod(hours, 24)
    if days:
        return f"{days}d {hours_of_day:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def encodable(text: str, encoding: str) -> str:
    """`text` made visible, with `?` for what the encoding lacks."""
    return visible(text).encode(encoding, errors="replace").decode(encoding)


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """A curve of one line: means of `width` equal stretches (fewer if there are fewer values); NaN is a gap."""
    levels = ".:-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)] if width > 0 else []
    means = []
    for start, end in zip(edges, edges[1:], strict=False):
        finite = [value for value in values[start:end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return " " * len(means)
    low, spread = min(known), max(known) - min(known)
    top = len(levels) - 1
    return "".join(
        " " if math.isnan(mean) else levels[round((mean - low) / spread * top) if spread > 0 else top // 2]
        for mean in means
    )
