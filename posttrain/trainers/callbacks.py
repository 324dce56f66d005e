"""What happens between steps: stopping on a signal, completing checkpoints, evaluating on a schedule."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.state.checkpoint import write_state


class StopOnSignal(TrainerCallback):
    """The first SIGINT or SIGTERM ends the run after the current step, with a checkpoint; a second one ends it at once.

    Args:
        together: number of steps that share rollouts; the run ends after the last of them, so that none are lost.

    Use as a context manager around training. Outside the main thread signals cannot be caught and nothing is installed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, together: int = 1) -> None:
        self.together = together
        self.stopped_by: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number)
        text = f"\n{self.stopped_by.name}: finishing this step and saving a checkpoint; once more to stop at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # not a buffered stream: the signal may have hit a write to one

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped_by is not None and state.global_step % self.together == 0:
            control.should_training_stop = control.should_save = True


class CompleteCheckpoints(TrainerCallback):
    """Writes posttrain's own state into every checkpoint, last, on the main rank."""

    def __init__(self, state_of_run: Callable[[], dict[str, Any]]) -> None:
        self.state_of_run = state_of_run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_state(folder, {"step": state.global_step, **self.state_of_run()})


class OnSchedule(TrainerCallback):
    """Calls `action(step)` before the first step and after every `every`-th one, once that step is logged."""

    def __init__(self, every: int, action: Callable[[int], None]) -> None:
        self.every, self.action = every, action
        self.due = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.action(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.due = control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.due:
            self.due = False
            self.action(state.global_step)
