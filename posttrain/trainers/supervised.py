"""The `sft` shell: rows with written completions, on TRL's SFTTrainer. Knows no method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from posttrain.data.sample import Sample
from posttrain.trainers.collate import Tensors, collate, split
from posttrain.trainers.order import StepOrder
from posttrain.trainers.shell import Shell
from posttrain.trl_compat import SFTHost


class SupervisedShell(Shell, SFTHost):
    """Trains on fixed samples."""

    def bind_samples(self, samples: Sequence[Sample], rows_per_step: int, pad_id: int) -> None:
        """Args:
        samples: the whole data set, fitted to the length limits.
        rows_per_step: rows per optimizer step over all ranks.
        """
        self.samples, self.pad_id = samples, pad_id
        self.order = StepOrder(len(samples), rows_per_step, self.args.seed)

    def step_batches(self, step: int) -> list[Tensors]:
        rows = self.order.share(step, self.accelerator.process_index, self.accelerator.num_processes)
        samples = [self.samples[i] for i in rows]
        micro_batches = split(samples, self.args.per_device_train_batch_size)
        return [collate([samples[i] for i in rows], self.pad_id) for rows in micro_batches]

    def forward_diagnostics(
        self, tensors: Tensors, logps: Tensor, entropies: Tensor | None, top1: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return {} if top1 is None else {"token_accuracy": (top1.sum(), tensors["mask"].sum())}
