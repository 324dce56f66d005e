"""The `sft` shell: rows with written completions, on TRL's SFTTrainer. Knows no method."""

from __future__ import annotations

from torch import Tensor
from trl import SFTConfig, SFTTrainer

from posttrain.data.sample import Sample
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
        if parts.mixture is not None and parts.mixture.order is not None:
            self.order = parts.mixture.order

    def step_batches(self, step: int) -> list[Tensors]:
        if self.parts.mixture is not None:
            self.parts.mixture.begin_step(self, step)
        rows = self.order.share(step, self.accelerator.process_index, self.accelerator.num_processes)
        samples = [self.parts.items[i] for i in rows]
        micro_batches = split(samples, self.args.per_device_train_batch_size, packs=self.packs)
        self.step_samples = [[samples[i] for i in indices] for indices in micro_batches]
        return [self._collate(rows) for rows in self.step_samples]

    def _collate(self, samples: list[Sample]) -> Tensors:
        tensors = collate(samples, self.parts.pad_id)
        return (
            tensors
            if self.parts.mixture is None
            else self.parts.mixture.mark(tensors, [one.problem_id for one in samples])
        )

    def forward_diagnostics(self, inputs: Tensors, forward: Forward) -> dict[str, tuple[Tensor, Tensor]]:
        by_source = {} if self.parts.mixture is None else self.parts.mixture.losses(inputs, forward.logps)
        return {"token_accuracy": (forward.top1.sum(), inputs["mask"].sum())} | by_source
