"""What became of rows that are read as steps ask for them: counted over ranks and resumes, written and told.

Each rank counts what it reads. A checkpoint holds the sums over the ranks, which the main one goes on from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.data.streaming import StreamedSamples, added
from posttrain.data.truncation import Ledger
from posttrain.safe_files import write_json_atomic

if TYPE_CHECKING:
    from posttrain.trainers.shell import Shell

COUNTS = "rows_read.json"
"""In a checkpoint: the ledger of each source."""


class CountRows(TrainerCallback):
    """Says at the end of a run what became of the rows that it read, and writes it to `data.json`."""

    def __init__(self, shell: Shell, items: StreamedSamples) -> None:
        self.shell, self.items = shell, items

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ledger = added(gather_object([self.items.ledgers]))
        if state.is_world_process_zero:
            write_json_atomic(self.shell.parts.run_dir / "data.json", ledger.to_dict())
            lines = ledger.lines()
            self.shell.tracker.message(f"rows read: {lines[0]}")
            for line in lines[1:]:
                self.shell.tracker.message(line)


def save_counts(shell: Shell, items: StreamedSamples, folder: Path) -> None:
    """Write the counts over all ranks into a checkpoint. Called on all ranks."""
    ranks: list[dict[str, Ledger]] = gather_object([items.ledgers])
    if shell.accelerator.is_main_process:
        sums = {name: added({name: rank[name]} for rank in ranks).to_dict() for name in items.ledgers}
        write_json_atomic(folder / COUNTS, sums)


def load_counts(items: StreamedSamples, checkpoint: Path) -> None:
    """Go on counting from a checkpoint."""
    saved = json.loads((checkpoint / COUNTS).read_text(encoding="utf-8"))
    items.set_ledgers({name: Ledger.of_dict(values) for name, values in saved.items()})
