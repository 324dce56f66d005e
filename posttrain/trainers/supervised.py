"""The `sft` shell: rows with written completions, on TRL's SFTTrainer. Knows no method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from trl import SFTConfig, SFTTrainer

from posttrain.data.order import Order, StepOrder, order_of
from posttrain.data.sample import Sample
from posttrain.data.streaming import StreamedSamples
from posttrain.models.collate import Tensors, collate, split
from posttrain.trainers.shell import Forward, RunParts, Shell
from posttrain.trainers.streamed import CountRows, load_counts, save_counts
from posttrain.trl_compat import SFTHost


class SupervisedShell(Shell, SFTHost, SFTTrainer):
    """Trains on fixed samples."""

    Arguments = SFTConfig

    wants_top1 = True

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        per_step, seed = parts.plan.units_per_step, self.args.seed
        if isinstance(parts.items, StreamedSamples):
            self.order: Order = StepOrder(len(parts.items), per_step, seed)
            self.add_callback(CountRows(self, parts.items))
        else:
            self.order = order_of([item.weight for item in parts.items], per_step, seed)
        self.order = parts.mixture.order or self.order

    def save_files(self, folder: Path) -> None:
        super().save_files(folder)
        if isinstance(self.parts.items, StreamedSamples):
            save_counts(self, self.parts.items, folder)

    def load_files(self, checkpoint: Path) -> None:
        super().load_files(checkpoint)
        if isinstance(self.parts.items, StreamedSamples) and self.accelerator.is_main_process:
            load_counts(self.parts.items, checkpoint)

    def step_batches(self, step: int) -> list[Tensors]:
        self.parts.mixture.begin_step(self.means.add, self.tracker.message, step)
        samples = [self.parts.items[i] for i in self.order.share(step, self.rank, self.world)]
        micro_batches = split(samples, self.args.per_device_train_batch_size, packs=self.packs)
        self.step_samples = [[samples[i] for i in numbers] for numbers in micro_batches]
        return [self._collate(rows) for rows in self.step_samples]

    def _collate(self, samples: Sequence[Sample]) -> Tensors:
        return self.parts.mixture.mark(collate(samples, self.parts.pad_id), [one.problem_id for one in samples])

    def forward_diagnostics(self, inputs: Tensors, forward: Forward) -> dict[str, tuple[Tensor, Tensor]]:
        assert forward.top1 is not None  # `wants_top1`
        by_source = self.parts.mixture.losses(inputs, forward.logps)
        return {"token_accuracy": (forward.top1.sum(), inputs["mask"].sum())} | by_source
