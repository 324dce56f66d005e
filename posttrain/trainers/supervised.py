"""The `sft` shell: rows with written completions, on TRL's SFTTrainer. Knows no method."""

from __future__ import annotations

from torch import Tensor
from trl import SFTConfig, SFTTrainer

from posttrain.trainers.collate import Tensors, collate, split
from posttrain.trainers.order import order_of
from posttrain.trainers.shell import Forward, RunParts, Shell
from posttrain.trl_compat import SFTHost


class SupervisedShell(Shell, SFTHost, SFTTrainer):
    """Trains on fixed samples."""

    Arguments = SFTConfig

    wants_top1 = True

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.order = order_of([item.weight for item in parts.items], parts.plan.units_per_step, self.args.seed)

    def step_batches(self, step: int) -> list[Tensors]:
        rows = self.order.share(step, self.accelerator.process_index, self.accelerator.num_processes)
        samples = [self.parts.items[i] for i in rows]
        micro_batches = split(samples, self.args.per_device_train_batch_size, packs=self.packs)
        self.step_samples = [[samples[i] for i in indices] for indices in micro_batches]
        return [collate(rows, self.parts.pad_id) for rows in self.step_samples]

    def forward_diagnostics(self, inputs: Tensors, forward: Forward) -> dict[str, tuple[Tensor, Tensor]]:
        return {"token_accuracy": (forward.top1.sum(), inputs["mask"].sum())}
