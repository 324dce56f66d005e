from __future__ import annotations

import io
import math

import pytest
from rich.console import Console as RichConsole

from posttrain.tracking.alarms import Alarm
from posttrain.tracking.console import (
    NoConsole,
    PlainConsole,
    duration,
    evaluation_lines,
    sparkline,
)
from posttrain.tracking.live import LiveConsole
from posttrain.tracking.tracker import make_console


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ONLINE = {
    "reward": 0.5,
    "accuracy": 0.25,
    "loss": 0.0123,
    "kl": 0.01,
    "entropy": 0.75,
    "completion_length": 128.0,
    "truncated_share": 0.125,
    "informative_groups": 0.5,
    "grad_norm": 0.3,
    "learning_rate": 1e-6,
    "tokens_per_second": 1234.0,
}
SUPERVISED = {"loss": 1.25, "token_accuracy": 0.625, "grad_norm": 2.0, "tokens_per_second": 9000.0}
EVALUATION = {
    "eval/gsm8k/greedy": 0.412,
    "eval/gsm8k/greedy_low": 0.38,
    "eval/gsm8k/greedy_high": 0.444,
    "eval/gsm8k/completion_length": 99.0,
}
ALARM = Alarm("entropy low", "entropy", 7, 0.001, "entropy 0.001 is below 0.01. Lower the learning rate.")


def plain_run(steps: int, seconds_per_step: float, stream: io.TextIOBase | None = None) -> list[str]:
    stream, clock = stream or io.StringIO(), Clock()
    console = PlainConsole(steps, "reward", stream, clock=clock)
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        console.update(step, ONLINE)
    console.close()
    return stream.getvalue().splitlines() if isinstance(stream, io.StringIO) else []


def test_plain_line() -> None:
    first, second, third = plain_run(3, 20.0)
    assert first == (
        "step 1/3  reward  0.500  acc 0.250  kl 0.0100  entropy 0.750  length   128  truncated 12.5%"
        "  informative  50%  grad     0.3  tok/s   1234  elapsed 0:20"
    )
    assert second.endswith("  elapsed 0:40  left 0:20")
    assert third.endswith("  elapsed 1:00  left 0:00")


@pytest.mark.parametrize(
    ("steps", "seconds", "low", "high"),
    [
        (1, 1.0, 1, 1),
        (20, 0.1, 20, 20),  # 2% is less than a step
        (1000, 0.01, 50, 52),  # every 20 steps, the first and the last
        (1000, 5.0, 333, 335),  # every 15 s comes first: every third step
        (1000, 60.0, 1000, 1000),  # slow steps are worth a line each
    ],
)
def test_plain_is_sparing(steps: int, seconds: float, low: int, high: int) -> None:
    shown = plain_run(steps, seconds)
    assert low <= len(shown) <= high
    assert shown[0].startswith(f"step {1:>{len(str(steps))}}/{steps} ")
    assert shown[-1].startswith(f"step {steps}/{steps} ")
    assert len(set(shown)) == len(shown)


def test_plain_lines_are_aligned() -> None:
    stream, clock = io.StringIO(), Clock()
    console = PlainConsole(100, "reward", stream, clock=clock)
    for step, reward in ((5, -0.25), (50, 1.0), (100, math.nan)):
        console.update(step, ONLINE | {"reward": reward, "completion_length": 10.0 * step})
    assert len({line.index("  tok/s") for line in stream.getvalue().splitlines()}) == 1


def test_plain_shows_the_last_step_of_a_run_that_stops_early() -> None:
    stream = io.StringIO()
    console = PlainConsole(1000, "reward", stream, clock=Clock())
    for step in (1, 2, 3):
        console.update(step, ONLINE)
    console.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/1000", "3/1000"]


def test_plain_shows_what_a_supervised_run_has() -> None:
    stream = io.StringIO()
    PlainConsole(1, "loss", stream, clock=Clock()).update(1, SUPERVISED)
    line = stream.getvalue()
    assert line.startswith("step 1/1  loss  1.2500  token acc 0.625  grad       2  tok/s   9000")
    assert "reward" not in line and "kl" not in line


def test_any_registered_headline_is_shown_first() -> None:
    stream = io.StringIO()
    PlainConsole(1, "eval_seconds", stream, clock=Clock()).update(1, {"loss": 1.0, "eval_seconds": 3.0})
    assert stream.getvalue().startswith("step 1/1  eval_seconds       3  loss  1.0000")


def test_plain_always_shows_evaluations_messages_and_alarms() -> None:
    stream = io.StringIO()
    console = PlainConsole(1000, "reward", stream, clock=Clock())
    console.update(1, ONLINE)
    console.update(2, EVALUATION)
    console.message("saved checkpoint-2")
    console.alarm(ALARM)
    assert stream.getvalue().splitlines()[1:] == [
        "step 2  eval gsm8k  greedy 0.412 [0.380, 0.444]  completion length 99.0",
        "saved checkpoint-2",
        "ALARM at step 7: entropy 0.001 is below 0.01. Lower the learning rate.",
    ]


def test_plain_survives_a_stream_that_lacks_characters() -> None:
    raw = io.BytesIO()
    console = PlainConsole(1, "reward", io.TextIOWrapper(raw, encoding="ascii"), clock=Clock())
    console.message("naïve → [/x]")
    assert raw.getvalue() == b"na?ve ? [/x]\n"


def test_plain_survives_a_reader_that_left() -> None:
    class Closed(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Closed()
    plain_run(5, 20.0, stream)
    assert stream.writes == 1


# --------------------------------------------------------------------------------------------------------------- live


def live(width: int, encoding: str = "utf-8") -> tuple[LiveConsole, RichConsole]:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    rich_console = RichConsole(
        file=terminal, record=True, width=width, height=30, force_terminal=True, color_system=None, highlight=False
    )
    clock = Clock()
    console = LiveConsole(40, "reward", terminal, clock=clock, rich_console=rich_console)
    for step in range(1, 21):
        clock.now += 30.0
        console.update(step, ONLINE | {"reward": step / 20})
    console.update(20, EVALUATION)
    console.message("saved [checkpoint-20] → disk")
    console.alarm(ALARM)
    return console, rich_console


@pytest.mark.parametrize("width", [100, 60, 40, 20])
def test_live_panel(width: int) -> None:
    console, rich_console = live(width)
    console.close()
    rich_console.export_text()  # forget what came before
    rich_console.print(console.render())
    panel = rich_console.export_text()
    assert all(len(line) <= width for line in panel.splitlines())
    assert "step 20/40" in panel and "50%" in panel
    assert "reward 1.000" in panel and "acc 0.250" in panel and "informative 50%" in panel
    assert "ALARM at step 7: ent" in panel
    if width >= 40:
        assert "elapsed 10:00  left 10:00" in panel
    if width >= 60:
        assert "reward ▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██ 0.05 to 1" in panel
        assert "step 20  eval gsm8k  greedy 0.412 [0.380, 0.444]" in panel
        assert "saved [checkpoint-20] → disk" in panel
        assert len(panel.splitlines()) <= 9


def test_live_messages_and_alarms_stay_above_the_panel() -> None:
    console, rich_console = live(100)
    console.close()
    text = rich_console.export_text()
    assert "saved [checkpoint-20] → disk" in text
    assert "ALARM at step 7: entropy 0.001 is below 0.01. Lower the learning rate." in text


def test_live_survives_a_terminal_that_lacks_characters() -> None:
    console, rich_console = live(80, encoding="ascii")
    console.close()
    text = rich_console.export_text()
    assert text.isascii()
    assert "saved [checkpoint-20] ? disk" in text
    assert "reward ..:::--===+++**###@@ 0.05 to 1" in text


def test_live_supervised_panel_has_no_reward() -> None:
    terminal = io.StringIO()
    rich_console = RichConsole(file=terminal, record=True, width=100, force_terminal=True, color_system=None)
    console = LiveConsole(10, "loss", terminal, rich_console=rich_console)
    console.update(1, SUPERVISED)
    console.close()
    text = rich_console.export_text()
    assert "loss 1.2500" in text and "token acc 0.625" in text and "reward" not in text


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("kind", "stream", "term", "expected"),
    [
        ("off", Terminal(), "xterm", NoConsole),
        ("plain", Terminal(), "xterm", PlainConsole),
        ("auto", io.StringIO(), "xterm", PlainConsole),
        ("auto", Terminal(), "dumb", PlainConsole),
        ("auto", Terminal(), "", PlainConsole),
        ("auto", Terminal(), "xterm-256color", LiveConsole),
        ("live", io.StringIO(), "xterm", LiveConsole),
    ],
)
def test_choice(kind: str, stream: io.StringIO, term: str, expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    console = make_console(kind, total_steps=1, headline="reward", stream=stream)
    console.close()
    assert type(console) is expected


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (42.9, "0:42"), (725, "12:05"), (11220, "3:07:00"), (86400 * 2 + 4 * 3600 + 600, "2d 04:10")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 10, ""),
        ([1.0], 10, "▄"),
        ([2.0, 2.0, 2.0], 10, "▄▄▄"),
        ([0.0, 1.0], 10, "▁█"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8, "▁▂▃▄▅▆▇█"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
        ([0.0, math.nan, 1.0], 10, "▁ █"),
        ([math.nan, math.inf], 10, "  "),
        ([0.0, 1.0], 0, ""),
        ([0.0, 1.0], -5, ""),
    ],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


def test_evaluations_of_several_benchmarks() -> None:
    metrics = {"reward": 1.0, "eval/a/greedy": 0.5, "eval/b/c/avg@4": 0.25, "eval/a/pass@4": 0.75}
    assert evaluation_lines(metrics) == ["eval a  greedy 0.500  pass@4 0.750", "eval b/c  avg@4 0.250"]
