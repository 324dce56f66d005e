"""Guards against numbers that are not finite: leave out the update, keep its batch, stop when it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import ModelError
from posttrain.models.collate import Tensors
from posttrain.safe_files import folder_atomic, write_json_atomic
from posttrain.trainers.shell import Shell

FOLDER = "skipped"
MOST_KEPT = 20
"""Batches saved in one run; what goes wrong more often than that has been seen by then."""
HINT = (
    "lower training.learning_rate or training.max_grad_norm, lengthen the warm-up, or use bfloat16 instead of float16; "
    "`posttrain replay RUN --step N` shows the rows of a step; guards.skipped_updates is the limit"
)


class NonfiniteGuard(TrainerCallback):
    """Leaves out an update whose loss or gradient is NaN or infinite, on all ranks together.

    Weights and optimizer state stay as they are, bit for bit; the step counts, the schedule goes on and the log entry
    has `skipped_updates`. The batch goes to `<run>/skipped/step-N-rank-R`.

    Args:
        shell: the shell.
        limit: skipped updates in a row after which the run stops; 0 stops at the first one.
        agree: whether any rank says yes, asked by all ranks.

    Raises:
        ModelError: the limit is reached, or the update cannot be left out because DeepSpeed has made it already.
    """

    def __init__(self, shell: Shell, limit: int, agree: Callable[[bool], bool] = bool) -> None:
        self.shell, self.limit, self.agree = shell, limit, agree
        self.in_a_row = self.total = 0

    def state_dict(self) -> dict[str, int]:
        """JSON values."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting from a checkpoint."""
        self.in_a_row, self.total = state["in_a_row"], state["total"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses = torch.stack(self.shell.step_losses).tolist()
        norm = float(self.shell.grad_norm or 0.0)  # DeepSpeed has none before its first update
        if not self.agree(not math.isfinite(norm) or not all(map(math.isfinite, losses))):
            self.in_a_row = 0
            return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        step = state.global_step + 1
        folder = self._save(step, losses, norm) if self.total <= MOST_KEPT else None
        kept = f"; its batch is in {folder}" if folder else ""
        says = f"the loss or gradient of step {step} is not finite (losses {losses}, gradient norm {norm}){kept}"
        if self.shell.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ModelError(f"{says}; DeepSpeed has put it into the weights", where=f"step {step}", hint=HINT)
        if self.in_a_row > self.limit:
            raise ModelError(f"{says}; the {self.in_a_row}. in a row", where=f"step {step}", hint=HINT)
        for parameter in kwargs["model"].parameters():
            parameter.grad = None
        if state.is_world_process_zero:
            self.shell.means.add("skipped_updates", 1)
        self.shell.tracker.message(f"update skipped: {says}")

    def _save(self, step: int, losses: list[float], norm: float) -> Path:
        shell = self.shell
        name = f"step-{step:06d}-rank-{shell.rank}"
        with folder_atomic(shell.parts.run_dir / FOLDER / name) as folder:
            save_batch(folder, shell.step_inputs)
            write_json_atomic(
                folder / "batch.json",
                {"step": step, "losses": [repr(x) for x in losses], "grad_norm": repr(norm)},
            )
        return shell.parts.run_dir / FOLDER / name


def save_batch(folder: Path, micro_batches: list[Tensors]) -> None:
    """Micro-batches as `batch.safetensors`, with tensors named `<micro-batch>.<name>`."""
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, inputs in enumerate(micro_batches)
        for name, tensor in inputs.items()
        if isinstance(tensor, torch.Tensor)
    }
    save_file(tensors, folder / "batch.safetensors")
