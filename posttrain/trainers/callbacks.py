"""What happens between steps: stopping on a signal, completing checkpoints, evaluating on a schedule."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.state.checkpoint import STAGING, commit, retain

CALLBACKS: list[type[TrainerCallback]] = []
"""Callbacks of plugins, of which every run gets an instance each."""


def register(callback: type[TrainerCallback]) -> type[TrainerCallback]:
    """Give every run a callback of the Hugging Face Trainer; to be used as a decorator in a plugin."""
    if callback not in CALLBACKS:
        CALLBACKS.append(callback)
    return callback


SAME_KEYPRESS = 1.0
"""Seconds within which a second SIGINT is the first one again: a terminal sends it to the launcher and to its workers,
and the launcher passes it on."""


class StopOnSignal(TrainerCallback):
    """The first SIGINT, SIGTERM or SIGUSR1 ends the run after the current step, with a checkpoint.

    A later SIGINT ends it at once. Later SIGTERMs change nothing: schedulers send them to launcher and workers alike,
    and follow up with SIGKILL.

    Args:
        agree: whether any rank says yes, asked by all ranks after every step: a signal may reach one of them alone.

    Use as a context manager around training. Outside the main thread signals cannot be caught and nothing is installed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, agree: Callable[[bool], bool] = bool) -> None:
        self.agree = agree
        self.signal: signal.Signals | None = None
        self.stopped = False
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT and time.monotonic() - self._since > SAME_KEYPRESS:
                raise KeyboardInterrupt
            return
        self.signal, self._since = signal.Signals(number), time.monotonic()
        text = f"\n{self.signal.name}: finishing this step and saving a checkpoint; Ctrl-C stops at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # not a buffered stream: the signal may have hit a write to one

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agree(self.signal is not None):
            self.stopped = control.should_training_stop = control.should_save = True


class CompleteCheckpoints(TrainerCallback):
    """Turns what the Trainer has just written into a checkpoint; every rank takes part, the main one writes.

    Args:
        state_of_run: posttrain's own part, called on every rank.
        save_files: writes more files into the folder that is being filled, called on every rank.
        wait: returns once all ranks have called it.
        keep: number of checkpoints to keep; None for all.
        logs: files of the run that must not lag behind a checkpoint.
    """

    def __init__(
        self,
        state_of_run: Callable[[], dict[str, Any]],
        *,
        save_files: Callable[[Path], None] = lambda folder: None,
        wait: Callable[[], None] = lambda: None,
        keep: int | None = None,
        logs: tuple[Path, ...] = (),
    ) -> None:
        self.state_of_run, self.save_files = state_of_run, save_files
        self.wait, self.keep, self.logs = wait, keep, logs

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir)
        name = f"checkpoint-{state.global_step}"
        state_of_run = self.state_of_run()
        self.save_files(folder / STAGING / name)
        self.wait()
        if state.is_world_process_zero:
            for log in self.logs:
                _sync(log)
            commit(folder / STAGING / name, folder / name, {"step": state.global_step, **state_of_run})
            (folder / STAGING).rmdir()
            retain(folder, self.keep)
        self.wait()  # a rank that ended now would make its launcher end the one that writes


def _sync(path: Path) -> None:
    if path.exists():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


class AtStart(TrainerCallback):
    """Calls `action()` once, when the Trainer's loop has set itself up and loaded its checkpoint."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.action()


class LogLastStep(TrainerCallback):
    """Logs the last step too where `logging_steps` does not divide the steps: every run has an entry of its end."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True


class OnSchedule(TrainerCallback):
    """Calls `action(step)` before the first step, after every `every`-th and after the last, once that is logged."""

    def __init__(self, every: int, action: Callable[[int], None]) -> None:
        self.every, self.action = every, action
        self.due = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.action(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.due = control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.due:
            self.due = False
            self.action(state.global_step)
