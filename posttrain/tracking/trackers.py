"""What trackers get beside Hugging Face's own log: evaluations between steps, a table of samples, a figure of curves.

Everything is taken from the files of the run's folder, so that a tracker shows what `posttrain report` shows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from posttrain.config.schema import TrackingConfig
from posttrain.tracking.events import FILE_NAME, metrics_of

SAMPLES = "samples.jsonl"
LONGEST = 4000
"""Characters of a text in a tracker's table; the file has all of it."""

Rows = Sequence[Mapping[str, Any]]


def tell_trackers(callbacks: list[TrainerCallback], names: list[str], run_dir: Path, tracking: TrackingConfig) -> None:
    """Give the trackers that the recipe names what this module sends; nothing where it names none.

    Args:
        callbacks: of the Trainer, which has made the trackers' own; one more is put before them.
        names: of the trackers, by transformers' names.
        run_dir: folder of the run.
        tracking: what is sent.
    """
    kinds = tuple(get_reporting_integration_callbacks(names))
    reporting = [callback for callback in callbacks if type(callback) in kinds]
    if reporting:
        draw = (lambda: _curves(run_dir)) if tracking.plots else None
        callbacks.insert(0, WriteToTrackers(run_dir, reporting, samples=tracking.send_samples, draw=draw))


def _curves(run_dir: Path) -> list[Path]:
    from posttrain.tracking.plots import plot_run

    return plot_run(run_dir)


class WriteToTrackers(TrainerCallback):
    """Sends what the run has written since the last entry; stands before the trackers' own callbacks, which close.

    Args:
        run_dir: folder of the run, rewound to where it goes on.
        reporting: the trackers' callbacks, as transformers made them.
        samples: whether texts of prompts and completions are sent.
        draw: draws the curves and returns the files; None: no figure is sent.
    """

    def __init__(
        self,
        run_dir: Path,
        reporting: Sequence[TrainerCallback],
        *,
        samples: bool,
        draw: Callable[[], Sequence[Path]] | None,
    ) -> None:
        self.reporting, self.draw = reporting, draw
        self.metrics = _Tail(run_dir / FILE_NAME)
        self.samples = _Tail(run_dir / SAMPLES) if samples else None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._send(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._send(args, state, control)
        for path in () if self.draw is None else self.draw():
            for callback in self.reporting:
                send = FIGURES.get(type(callback).__name__)
                if send is not None:
                    send(callback, path, state.global_step)

    def _send(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        for event in self.metrics.rows():
            found = metrics_of(event)
            if "alarm" in event or "loss" in found:  # training entries come by the trainer's own log
                continue
            then = copy.copy(state)
            then.global_step = event["step"]
            logs = {"eval_" + name.removeprefix("eval/"): value for name, value in found.items()}
            for callback in self.reporting:
                callback.on_log(args, then, control, logs=dict(logs))
        rows = [] if self.samples is None else [_cut(row) for row in self.samples.rows()]
        for callback in self.reporting if rows else ():
            send = TABLES.get(type(callback).__name__)
            if send is not None:
                send(callback, rows, state.global_step)


class _Tail:
    """The rows of a file of JSON lines, from its present end on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = path.stat().st_size if path.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        """Those since the last call; a line that is not finished comes with the next."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.at)
            *lines, _ = file.read().split(b"\n")
        self.at += sum(len(line) + 1 for line in lines)
        return [json.loads(line) for line in lines]


def _cut(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of plain values: long texts end early, what is nested is JSON."""
    plain = {
        key: value if value is None or isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
        for key, value in row.items()
    }
    return {key: value[:LONGEST] if isinstance(value, str) else value for key, value in plain.items()}


# ------------------------------------------------------------------------------- tables and figures, tracker by tracker


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _wandb_table(callback: Any, rows: Rows, step: int) -> None:
    import wandb

    names = _columns(rows)
    table = wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in rows])
    wandb.log({"samples": table, "train/global_step": step})


def _wandb_figure(callback: Any, path: Path, step: int) -> None:
    import wandb

    wandb.log({path.stem: wandb.Image(str(path)), "train/global_step": step})


def _trackio_table(callback: Any, rows: Rows, step: int) -> None:
    import pandas
    import trackio

    trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows)), "train/global_step": step})


def _trackio_figure(callback: Any, path: Path, step: int) -> None:
    import trackio

    trackio.log({path.stem: trackio.Image(path), "train/global_step": step})


def _tensorboard_table(callback: Any, rows: Rows, step: int) -> None:
    names = _columns(rows)
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    callback.tb_writer.add_text("samples", text, step)


def _cell(text: str) -> str:
    """Text within a cell of a Markdown table, where nothing of it is markup or ends the row."""
    for character, name in {"&": "&amp;", "<": "&lt;", "|": "&#124;", "`": "&#96;", "\r": "", "\n": "<br>"}.items():
        text = text.replace(character, name)
    return text


def _tensorboard_figure(callback: Any, path: Path, step: int) -> None:
    from matplotlib.image import imread

    callback.tb_writer.add_image(path.stem, imread(path), step, dataformats="HWC")


def _mlflow_table(callback: Any, rows: Rows, step: int) -> None:
    import mlflow

    mlflow.log_table({name: [row.get(name) for row in rows] for name in _columns(rows)}, "samples.json")


def _mlflow_figure(callback: Any, path: Path, step: int) -> None:
    import mlflow

    mlflow.log_artifact(str(path), "plots")


TABLES: dict[str, Callable[[Any, Rows, int], None]] = {
    "WandbCallback": _wandb_table,
    "TrackioCallback": _trackio_table,
    "TensorBoardCallback": _tensorboard_table,
    "MLflowCallback": _mlflow_table,
}
"""Class of a tracker's callback -> how it takes a table; the others get numbers alone."""

FIGURES: dict[str, Callable[[Any, Path, int], None]] = {
    "WandbCallback": _wandb_figure,
    "TrackioCallback": _trackio_figure,
    "TensorBoardCallback": _tensorboard_figure,
    "MLflowCallback": _mlflow_figure,
}
"""The same for a figure."""
